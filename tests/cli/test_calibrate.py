"""zimage-lite calibrate, and quantize --calibration."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from zimage_lite.api import open_named
from zimage_lite.calibration import files, imatrix
from zimage_lite.calibration.statistics import OTHERS, Moments, Statistics, input_of, row_weights
from zimage_lite.checkpoint.model_card import DEMO, model_folder
from zimage_lite.checkpoint.opening import open_tensor_file
from zimage_lite.cli import run
from zimage_lite.config import RuntimeOptions
from zimage_lite.pipeline import calibrating
from zimage_lite.pipeline.drawing import Pipeline
from zimage_lite.units import parse_bytes

pytestmark = pytest.mark.slow  # draws with the demo, which is watched

PART = "layers.0.feed_forward.w2.weight"
QUICK = ("--steps", "2", "--products", "whole")


def calibrate(out: Path, prompts: str, *options: str) -> int:
    file = out.with_name("prompts.txt")
    file.write_text(prompts, encoding="utf-8")
    return run(["calibrate", "demo", "-o", str(out), "--prompts", str(file), *QUICK, *options])


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("statistics") / "demo.safetensors"
    assert calibrate(out, "a red circle on a blue background\n\n蓝色背景上的红色圆形\n") == 0
    return out


def written(path: Path) -> Statistics:
    return files.resume(path)


def test_what_is_gathered(statistics: Path) -> None:
    """Of two prompts and two steps of 16 patches, filled up to 32, with 32 tokens of a caption each."""
    found = written(statistics)
    assert found.prompts == ["a red circle on a blue background", "蓝色背景上的红色圆形"]
    assert len(found.inputs) == len({input_of(name) for name in found.inputs})
    layer = found.inputs["layers.0.attention.to_q.weight"]
    rows = 2 * 16 * (1 + OTHERS)  # of both prompts, as far as they count
    assert layer.counts.tolist() == pytest.approx([rows, 0, rows, 0])
    assert found.inputs["all_x_embedder.2-1.weight"].counts.sum() == 2 * 2 * 16
    assert found.inputs["layers.0.adaLN_modulation.0.weight"].counts.sum() == calibrating.TIMES
    for name, own in found.inputs.items():
        assert own.products is None or torch.allclose(
            own.products.diagonal(dim1=1, dim2=2).flatten(), own.squares.sum(0).float(), rtol=1e-3
        ), name


def test_moments_are_those_of_the_rows() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(0, 1, (70, 32)).astype(np.float32)
    own = Moments.empty(32, 16)
    own.add(torch.from_numpy(x[:30]), 0)
    own.add(torch.from_numpy(x[30:]), 3)
    assert own.counts.tolist() == [30, 0, 0, 40]
    assert np.allclose(own.mean_squares, np.square(x).mean(0), rtol=1e-5)
    assert own.products is not None
    for at in (0, 16):
        assert np.allclose(own.products[at // 16], x[:, at : at + 16].T @ x[:, at : at + 16], atol=1e-4)


def test_rows_that_are_no_image_count_less() -> None:
    """However many there are, as much as a tenth of the image."""
    rng = np.random.default_rng(2)
    x = rng.normal(0, 1, (11, 8)).astype(np.float32)
    weights = row_weights([2, 4], [5, 6])
    assert weights.tolist() == pytest.approx([1, 1, 0.12, 0.12, 0.12, 1, 1, 1, 1, 0.12, 0.12])
    assert torch.equal(row_weights([3], [3]), torch.ones(3))
    own = Moments.empty(8, 8)
    own.add(torch.from_numpy(x), 1, weights)
    w = weights.numpy()[:, None]
    assert np.allclose(own.mean_squares, (w * x * x).sum(0) / w.sum(), rtol=1e-5)
    assert own.products is not None and np.allclose(own.products[0], (w * x).T @ x, atol=1e-4)


def test_only_what_is_missing_is_drawn(statistics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo.safetensors"
    out.write_bytes(statistics.read_bytes())
    before = out.read_bytes()
    assert calibrate(out, "a red circle on a blue background\n") == 0
    assert out.read_bytes() == before
    assert calibrate(out, "a red circle on a blue background\na green star\n", "--json") == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == 3
    assert written(out).inputs["layers.0.attention.to_q.weight"].counts.sum() == pytest.approx(
        3 * 2 * 16 * (1 + OTHERS)
    )
    assert calibrate(out, "a cross\n", "--width", "128") == 2
    assert "was gathered otherwise" in capsys.readouterr().err


def test_an_interrupt_leaves_whole_statistics_of_fewer_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of one; the third prompt is interrupted in its last step."""
    out, steps = tmp_path / "demo.safetensors", list[int]()
    add = Moments.add

    def interrupted(self: Moments, x: torch.Tensor, quarter: int, weights: torch.Tensor | None = None) -> None:
        steps.append(quarter)
        if len(written(out).prompts if out.exists() else []) == 2 and quarter:
            raise KeyboardInterrupt
        add(self, x, quarter, weights)

    monkeypatch.setattr("zimage_lite.pipeline.grouping.MOST_PER_ROUND", 1)
    monkeypatch.setattr("zimage_lite.plan.prediction._BATCHES", (1,))
    monkeypatch.setattr(calibrating, "SAVING_SHARE", 1e9)
    monkeypatch.setattr(Moments, "add", interrupted)
    assert calibrate(out, "a red circle\na green star\na blue cross\n") == 130
    found = written(out)
    assert found.prompts == ["a red circle", "a green star"]
    assert found.inputs["layers.0.attention.to_q.weight"].counts.sum() == pytest.approx(2 * 2 * 16 * (1 + OTHERS))


@pytest.mark.parametrize("end", imatrix.SUFFIXES)
def test_an_imatrix_says_the_same(statistics: Path, tmp_path: Path, end: str) -> None:
    out = tmp_path / f"imatrix{end}"
    files.write(out, written(statistics))
    ours, theirs = files.read(statistics), files.read(out)
    assert theirs.squares.keys() == ours.squares.keys()
    for name, mean in ours.squares.items():
        assert torch.allclose(theirs.squares[name], mean, rtol=1e-5), name
    assert theirs.config is None and not theirs.products


def test_gguf_py_reads_our_imatrix(statistics: Path, tmp_path: Path) -> None:
    out = tmp_path / "imatrix.gguf"
    files.write(out, written(statistics))
    reader = gguf.GGUFReader(out)
    assert reader.fields["general.type"].contents() == "imatrix"
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    own = written(statistics).inputs["layers.0.attention.to_q.weight"]
    assert np.allclose(found["layers.0.attention.qkv.weight.in_sum2"].flatten(), own.squares.sum(0), rtol=1e-6)
    assert found["layers.0.attention.qkv.weight.counts"].flatten().tolist() == pytest.approx([float(own.counts.sum())])
    assert {"layers.0.feed_forward.w1.weight.in_sum2", "layers.0.feed_forward.w3.weight.in_sum2"} <= found.keys()


def quantized(out: Path, *options: str) -> int:
    some = ("--component", "transformer", "--to", "q4_0", "--keep", "layers.1.*", "--keep", "layers.2.*")
    return run(["quantize", "demo", "-o", str(out), *some, *options])


def test_quantizing_with_statistics(statistics: Path, tmp_path: Path) -> None:
    """An imatrix gives what our own file gives, but for the rounding of its sums; with X^T X best gives something else
    of the same size."""
    files.write(tmp_path / "sums.gguf", written(statistics))
    known, options = ("--calibration", str(statistics)), ("--effort", "best")
    for name, more in {
        "blind": (), "own": known, "imatrix": ("--calibration", str(tmp_path / "sums.gguf")),
        "best": (*known, *options),
    }.items():  # fmt: skip
        assert quantized(tmp_path / f"{name}.gguf", *more) == 0
    blind, own, same, best = ((tmp_path / f"{name}.gguf").read_bytes() for name in ("blind", "own", "imatrix", "best"))
    assert len({blind, own, best}) == 3 and len({len(blind), len(own), len(best), len(same)}) == 1
    assert np.mean(np.frombuffer(own, np.uint8) == np.frombuffer(same, np.uint8)) > 0.9999
    assert np.mean(np.frombuffer(own, np.uint8) == np.frombuffer(blind, np.uint8)) < 0.999


@pytest.mark.parametrize("to", ["int4", "nf4", "int8"])
def test_formats_of_others_with_statistics(statistics: Path, tmp_path: Path, to: str) -> None:
    """The same file but for its values, and those of what no statistics are of."""
    common = ("--component", "transformer", "--to", to, "--keep", "layers.1.*", "--keep", "layers.2.*")
    for name, more in {"blind": (), "best": ("--calibration", str(statistics), "--effort", "best")}.items():
        assert run(["quantize", "demo", "-o", str(tmp_path / f"{name}.safetensors"), *common, *more]) == 0
    blind, best = (open_tensor_file(tmp_path / f"{name}.safetensors") for name in ("blind", "best"))
    assert blind.metadata == best.metadata
    places = [
        {key: (entry.kind, entry.shape, entry.offset) for key, entry in file.entries.items()} for file in (blind, best)
    ]
    assert places[0] == places[1]
    differ = {key for key in blind.entries if not torch.equal(blind.entries[key].read(), best.entries[key].read())}
    assert any(key.startswith("layers.0.") for key in differ)
    assert not any(key.startswith(("layers.1.", "t_embedder", "cap_embedder")) for key in differ)


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


def changed(statistics: Path, out: Path, **config: Any) -> Path:
    found = written(statistics)
    files.write(out, Statistics({**found.config, **config}, found.settings, found.prompts, found.inputs))
    return out


def test_what_does_not_fit_is_refused(statistics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    other = changed(statistics, tmp_path / "other.safetensors", n_layers=30)
    assert quantized(tmp_path / "x.gguf", "--calibration", str(other)) == 2
    assert "statistics of another model: got n_layers 30, expected n_layers 3" in refused(capsys)
    own = written(statistics)
    short = {name: Moments(m.counts, m.squares[:, :16]) for name, m in own.inputs.items()}
    files.write(tmp_path / "short.gguf", Statistics({}, {}, own.prompts, short))
    assert quantized(tmp_path / "x.gguf", "--calibration", str(tmp_path / "short.gguf")) == 2
    assert "statistics of another model: got 16 channels" in refused(capsys)
    (tmp_path / "broken.dat").write_bytes(b"\x01\x00\x00\x00\xff\xff")
    assert quantized(tmp_path / "x.gguf", "--calibration", str(tmp_path / "broken.dat")) == 2
    assert "not an imatrix" in refused(capsys)
    fp8 = ("--component", "transformer", "--to", "fp8", "-o", str(tmp_path / "x.safetensors"))
    assert run(["quantize", "demo", *fp8, "--calibration", str(statistics)]) == 2
    assert "--calibration: not a format that is chosen by it: got fp8, expected int4, int8, " in refused(capsys)
    assert run(["calibrate", "demo", "-o", str(tmp_path / "x.npz")]) == 2
    assert "its end says what it is" in refused(capsys)
    assert not (tmp_path / "x.gguf").exists()


def damaged(statistics: Path, out: Path, change: Callable[[dict[str, Tensor]], object]) -> str:
    with safe_open(statistics, "pt") as file:
        said = file.metadata()
    tensors = load_file(statistics)
    change(tensors)
    save_file(tensors, out, said)
    return str(out)


@pytest.mark.parametrize(("part", "value"), [(".squares", torch.nan), (".squares", -1.0), (".counts", torch.inf)])
def test_what_is_no_sum_of_squares_is_refused(
    statistics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, value: float
) -> None:
    bad = damaged(statistics, tmp_path / "bad.safetensors", lambda of: of[f"{PART}{part}"].view(-1)[:1].fill_(value))
    capsys.readouterr()
    assert quantized(tmp_path / "x.gguf", "--calibration", bad) == 2
    assert f"{PART}{part} holds NaN, infinite or negative values" in refused(capsys)


def test_products_that_are_no_numbers_are_refused(
    statistics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = damaged(statistics, tmp_path / "bad.safetensors", lambda of: of[f"{PART}.products"].fill_(torch.nan))
    assert quantized(tmp_path / "x.gguf", "--calibration", bad, "--effort", "best") == 2
    assert f"{PART}.products holds NaN or infinite values" in capsys.readouterr().err
    assert not (tmp_path / "x.gguf").exists()


def test_linears_without_statistics_are_told(
    statistics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not in the file, or nothing ever came in."""

    def change(of: dict[str, Tensor]) -> None:
        for part in (".counts", ".squares", ".products"):
            of[f"{PART}{part}"].zero_()

    bad = damaged(statistics, tmp_path / "bad.safetensors", change)
    capsys.readouterr()
    assert quantized(tmp_path / "x.gguf", "--calibration", bad, "--effort", "best") == 0
    told = capsys.readouterr().err
    assert re.search(rf"know nothing of 1 of \d+ linears in blocks, {re.escape(PART)} first", told)


def test_the_model_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor does anything new go into its folder, where one more weights file would make it another kind of folder."""
    model, link, away = tmp_path / "model", tmp_path / "link", tmp_path / "away.safetensors"
    shutil.copytree(model_folder(DEMO), model)
    link.symlink_to(model)
    (file,) = (model / "transformer").glob("*.safetensors")
    away.symlink_to(file)
    prompts = tmp_path / "prompts.dat"
    prompts.write_text("a red circle\n", encoding="utf-8")
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    within, itself = "lies in a folder that is read", "the output would replace its own source"
    capsys.readouterr()
    for source, out, said in (
        (model, file, itself), (model, away, itself), (link, file, itself), (model, link / "x.safetensors", within),
        (model, model / "vae" / "x.gguf", within), (model, prompts, itself),
    ):  # fmt: skip
        assert run(["calibrate", str(source), "-o", str(out), "--prompts", str(prompts), *QUICK, "--overwrite"]) == 2
        assert f"{out}: {said}" in refused(capsys)
    assert {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} == before and away.is_symlink()
    assert prompts.read_text(encoding="utf-8") == "a red circle\n"


@pytest.mark.parametrize("weighing", [None, {"others": 1.0}])
def test_what_was_weighed_otherwise_is_refused(
    statistics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], weighing: object
) -> None:
    """Statistics of before it was said, and of another weight: neither used nor added to; gathered again, they are."""
    old = tmp_path / "old.safetensors"
    with safe_open(statistics, "pt") as file:
        said = json.loads(file.metadata()[files.KEY])
    said.pop("weighing")
    save_file(load_file(statistics), old, {files.KEY: json.dumps(said | ({"weighing": weighing} if weighing else {}))})
    before = old.read_bytes()
    capsys.readouterr()
    assert quantized(tmp_path / "x.gguf", "--calibration", str(old)) == 2
    assert "old.safetensors: statistics of another version, which weighed rows differently: got" in refused(capsys)
    assert calibrate(old, "a red circle\n") == 2
    assert "gather them again, with calibrate --overwrite" in refused(capsys)
    assert old.read_bytes() == before and not (tmp_path / "x.gguf").exists()
    assert calibrate(old, "a red circle\n", "--overwrite") == 0
    assert written(old).prompts == ["a red circle"]


@pytest.mark.parametrize(("ram", "width"), [("100GB", 384), ("60MB", 128), ("1MB", 32)])
def test_blocks_are_as_wide_as_the_memory_allows(ram: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrating, "WIDTHS", (calibrating.FULL, 128, 32))
    pipeline = Pipeline(open_named("demo", {}), RuntimeOptions("cpu", ram_bytes=parse_bytes(ram)))
    products = calibrating.begun(pipeline, None, {}).inputs["layers.0.attention.to_q.weight"].products
    assert products is not None and products.shape == (384 // width, width, width)
