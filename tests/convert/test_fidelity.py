"""What --report and --verify say: against the same figures worked out from the two files by numpy, in float64.

And what else a conversion owes its user: less error for more effort, a word on earlier losses, bounded memory."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from make_checkpoint import component_shapes, make_checkpoint, write_file, write_json
from marking import always
from safetensors.torch import load_file, save_file

from zimage_lite.checkpoint.checkpoint import Checkpoint, open_checkpoint
from zimage_lite.checkpoint.diffusers_config import config_json
from zimage_lite.checkpoint.stored import StoredTensor
from zimage_lite.checkpoint.writer import TensorWriter
from zimage_lite.cli import run
from zimage_lite.config import TextEncoderConfig, TransformerConfig
from zimage_lite.convert import streaming as convert
from zimage_lite.convert.fidelity import Sums, TensorError, by_group, figures, sums
from zimage_lite.convert.job import Written
from zimage_lite.convert.output_file import output_tensors
from zimage_lite.convert.quantize import quantize
from zimage_lite.convert.recipe import target, targets
from zimage_lite.quant.formats import EFFORTS, FORMATS

pytestmark = pytest.mark.slow  # whole models are converted


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float32, so that even what stays 16-bit is off by something."""
    folder = tmp_path_factory.mktemp("models") / "f32"
    make_checkpoint(folder, "tiny", "f32", seed=4)
    return folder


def truth(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    x, y = x.astype(np.float64).ravel(), y.astype(np.float64).ravel()
    return {
        "weights": len(x),
        "relative_rmse": float(np.sqrt(np.mean((x - y) ** 2) / np.mean(x**2))),
        "cosine": float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)),
        "largest_error": float(abs(x - y).max()),
    }


def assert_same(figures: dict[str, Any], wanted: dict[str, float]) -> None:
    assert figures["weights"] == wanted["weights"]
    for name in ("relative_rmse", "largest_error"):  # five digits are written
        assert figures[name] == pytest.approx(wanted[name], rel=6e-5, abs=1e-12), name
    assert figures["cosine"] == pytest.approx(wanted["cosine"], abs=1e-7)


# --- The sums


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("error", [1e-4, 0.1, 3.0])
def test_sums_are_numpys(size: float, error: float) -> None:
    x = torch.randn(300, 1000) * size
    y = x + torch.randn(300, 1000) * size * error
    found = sums(x, y)
    wanted = truth(x.numpy(), y.numpy())
    assert found.count == 300_000
    assert found.relative_rmse == pytest.approx(wanted["relative_rmse"], rel=1e-5)
    assert found.cosine == pytest.approx(wanted["cosine"], abs=1e-6)
    assert found.largest == pytest.approx(wanted["largest_error"], rel=1e-6)
    assert found.xx == pytest.approx(float((x.double() ** 2).sum()), rel=1e-6)


def test_sums_add_up() -> None:
    x, y = torch.randn(64, 128), torch.randn(64, 128)
    parts = [sums(x[rows], y[rows]) for rows in (slice(0, 5), slice(5, 6), slice(6, 64))]
    total = sum(parts, Sums())
    whole = sums(x, y)
    assert (total.count, total.largest) == (whole.count, whole.largest)
    for name in ("xx", "yy", "xy", "error"):
        assert getattr(total, name) == pytest.approx(getattr(whole, name), rel=1e-9)


def test_nothing_lost_is_no_error() -> None:
    x = torch.randn(8, 64)
    assert (sums(x, x).relative_rmse, sums(x, x).largest) == (0, 0)
    assert sums(x, x).cosine == pytest.approx(1)


def test_zeros() -> None:
    zeros, ones = torch.zeros(2, 8), torch.ones(2, 8)
    assert (sums(zeros, zeros).relative_rmse, sums(zeros, zeros).cosine) == (0, 1)
    assert (sums(ones, zeros).relative_rmse, sums(ones, zeros).cosine) == (1, 0)
    assert (sums(zeros, ones).relative_rmse, sums(zeros, ones).cosine) == (1, 0)
    assert (Sums().relative_rmse, Sums().cosine) == (0, 1)


def test_figures_of_tensors_together_are_those_of_all_weights() -> None:
    pairs = [(torch.randn(4, 64) * scale, torch.randn(4, 64)) for scale in (1, 100)]
    errors = [TensorError("a", "a.weight", "q8_0", 100, sums(x, y)) for x, y in pairs]
    x, y = (torch.cat(side) for side in zip(*pairs, strict=True))
    found = figures(errors)
    assert_same(found, truth(x.numpy(), y.numpy()))
    assert (found["tensors"], found["formats"], found["bytes"]) == (2, ["q8_0"], 200)
    assert found["bits_per_weight"] == pytest.approx(200 * 8 / 512, abs=1e-4)


# --- Groups

CONFIGS = {"transformer": TransformerConfig(), "text_encoder": TextEncoderConfig()}


@pytest.mark.parametrize("component", CONFIGS)
@pytest.mark.parametrize("to", targets())
def test_groups_cover_all_tensors(to: str, component: str) -> None:
    shapes = component_shapes(CONFIGS[component])
    tensors = {name: StoredTensor(name, FORMATS["bf16"], shape, {}) for name, shape in shapes.items()}
    out = output_tensors(Checkpoint(component, Path(), "", tensors, CONFIGS[component]), target(to))
    groups = by_group(TensorError(t.name, t.sources[0].name, t.format.name, t.nbytes, Sums()) for t in out)
    assert "other" not in groups
    assert sorted(error.name for group in groups.values() for error in group) == sorted(t.name for t in out)
    for group, members in groups.items():
        if group not in ("embedders", "norms, biases, pads", "final_layer"):
            assert not any("norm" in error.name or error.name.endswith("bias") for error in members), group


# --- Reports

GROUPS = {  # of canonical names, written out once more; the first that fits
    "norms, biases, pads": ("*norm*", "*.bias", "*pad_token", "cap_embedder.0.weight"),
    "embedders": ("t_embedder*", "all_x_embedder*", "cap_embedder*"), "final_layer": ("all_final_layer*",),
    "refiners": ("*_refiner*",), "adaln": ("*adaLN*",), "qkv": ("*.to_q.*", "*.to_k.*", "*.to_v.*"),
    "out": ("*.to_out.*",), "w1, w3": ("*.w1.*", "*.w3.*"), "w2": ("*.w2.*",), "embedding": ("embed_tokens*",),
    "attn_qk": ("*.q_proj*", "*.k_proj*"), "attn_v": ("*.v_proj*",), "attn_out": ("*.o_proj*",),
    "ffn_gate, ffn_up": ("*.gate_proj*", "*.up_proj*"), "ffn_down": ("*.down_proj*",),
}  # fmt: skip


def group_of(name: str) -> str:
    group = next(g for g, patterns in GROUPS.items() if any(fnmatchcase(name, p) for p in patterns))
    return "embedders" if name == "cap_embedder.0.weight" else group


def weights_by_group(path: Path) -> dict[str, np.ndarray]:
    found: dict[str, list[np.ndarray]] = {"all": []}
    for name, tensor in sorted(open_checkpoint(path).tensors.items()):
        wide = tensor.read_float().numpy().ravel()
        for group in (group_of(name), "all"):
            found.setdefault(group, []).append(wide)
    return {group: np.concatenate(parts) for group, parts in found.items()}


REPORTED = ["q8_0", "q4_0", "q2_k", "int8", "int4", "fp8", "nf4", "qint8", "bf16"]


@pytest.mark.slow  # a model in every format
@pytest.mark.parametrize("to", always("q8_0", "q2_k", "int4", "nf4", of=REPORTED))
def test_report_is_the_error_of_what_was_written(source: Path, tmp_path: Path, to: str) -> None:
    out, file = tmp_path / "out", tmp_path / "report.json"
    args = ["--text-encoder-to", "q8_0" if to in ("bf16", "qint8") else target(to).text_encoder_to]
    assert run(["quantize", str(source), "--to", to, "-o", str(out), "--report", str(file), *args]) == 0
    said = json.loads(file.read_text())
    assert (said["to"], said["effort"], set(said["components"])) == (to, "reference", {"transformer", "text_encoder"})
    for component, found in said["components"].items():
        before, after = weights_by_group(source / component), weights_by_group(out / component)
        assert {*found["groups"], "all"} == set(before)
        for group, row in {**found["groups"], "all": found["all"]}.items():
            assert_same(row, truth(before[group], after[group]))
        stored = open_checkpoint(out / component)
        assert set(found["all"]["formats"]) == {tensor.format.name for tensor in stored.tensors.values()}
        assert found["all"]["tensors"] == sum(row["tensors"] for row in found["groups"].values())
        assert found["all"]["bytes"] == sum(row["bytes"] for row in found["groups"].values())


def test_report_is_printed_as_well(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    args = ["--component", "transformer", "-o", str(tmp_path / "out.gguf"), "--report", str(file), "--json"]
    assert run(["quantize", str(source), "--to", "q4_0", *args]) == 0
    captured = capsys.readouterr()
    said = json.loads(file.read_text())["components"]
    assert json.loads(captured.out.splitlines()[-1])["errors"] == said
    for group, row in said["transformer"]["groups"].items():
        (line,) = [line for line in captured.err.splitlines() if line.startswith(f"  {group}  ")]
        assert f"{row['relative_rmse']:.5f}" in line and line.split()[-len(row["formats"]) :] == row["formats"]


def test_what_is_passed_on_is_no_error(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "a.gguf", "q4_0", component="transformer")
    (again,) = quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "q4_0", measure=True)
    assert len(again.errors) == len(open_checkpoint(tmp_path / "a.gguf").tensors) - 2 * 7  # q, k and v are one
    assert {error.sums.error for error in again.errors} == {0.0}


def test_nothing_is_measured_unless_asked_for(source: Path, tmp_path: Path) -> None:
    (written,) = quantize(source, tmp_path / "a.gguf", "q4_0", component="transformer")
    assert list(written.errors) == []


# --- --verify


def test_verify_names_the_worst(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One tensor of weights that 4 bits cannot hold; its name is the first."""
    file = next((source / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    bad = tensors["layers.1.feed_forward.w3.weight"]
    bad[:, ::32] *= 1e3
    bad[:, 1::32] *= 1e2
    save_file(tensors, tmp_path / "in.safetensors")
    args = ["quantize", str(tmp_path / "in.safetensors"), "--to", "q4_0", "-o", str(tmp_path / "out.gguf")]
    assert run([*args, "--tensor", "*.w3.*=q2_k", "--tensor", "*.w1.*=q8_0", "--verify"]) == 0
    lines = capsys.readouterr().err.splitlines()
    (start,) = [i for i, line in enumerate(lines) if "tensors read back as they were written" in line]
    worst = [line.split() for line in lines[start + 1 : start + 6]]
    figures = [float(words[0]) for words in worst]
    assert figures == sorted(figures, reverse=True) and figures[0] > 0
    before, after = open_checkpoint(tmp_path / "in.safetensors").tensors, open_checkpoint(tmp_path / "out.gguf").tensors
    errors = {
        name: truth(before[name].read_float().numpy(), after[name].read_float().numpy())["relative_rmse"]
        for name in before
        if ".to_" not in name
    }
    for words in worst:
        name = words[-1].replace(".attention.out.", ".attention.to_out.0.")
        if ".qkv." not in name:
            assert float(words[0]) == pytest.approx(errors[name], rel=1e-3, abs=1e-5)
    assert figures[0] >= max(errors.values()) - 1e-5


@pytest.mark.parametrize("to", ["q8_0", "int8", "nf4", "bf16"])
@pytest.mark.parametrize("nth", [3, 40])
def test_verify_notices_a_failing_disk(
    source, tmp_path: Path, refused: Callable[..., str], monkeypatch, to, nth
) -> None:
    """One bit of one array arrives flipped."""
    tensors = output_tensors(open_checkpoint(source / "transformer"), target(to))
    nth += sum(tensor.format.container == "comfy" for tensor in tensors)  # markers come first, and are not read back
    write, calls = TensorWriter.write, []

    def corrupting(self: TensorWriter, offset: int, tensor: torch.Tensor) -> None:
        calls.append(offset)
        if len(calls) == nth:
            tensor = tensor.contiguous().flatten().view(torch.uint8).clone()
            tensor[-1] ^= 1
        write(self, offset, tensor)

    monkeypatch.setattr(TensorWriter, "write", corrupting)
    args = ("quantize", source, "--to", to, "--component", "transformer", "-o", tmp_path / "out")
    line = refused(*args, "--verify")
    assert "reads back differently" in line and "disk" in line
    assert list(tmp_path.iterdir()) == []
    calls.clear()
    assert run([*map(str, args)]) == 0  # unseen without it


# --- --effort


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text encoder whose rows are whole blocks of 256, with outliers as trained ones have."""
    folder = tmp_path_factory.mktemp("wide")
    config = TextEncoderConfig(
        vocab_size=320, hidden_size=256, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=128, intermediate_size=512,
    )  # fmt: skip
    wanted = {f"model.{name}": ((name,), shape) for name, shape in component_shapes(config).items()}
    write_file(folder / "model.safetensors", wanted, torch.float32, 5, "text_encoder")
    write_json(folder / "config.json", config_json(config))
    return folder


def error_in(written: Written, row: str) -> float:
    """Of all tensors in one format."""
    return sum((error.sums for error in written.errors if error.format == row), Sums()).relative_rmse


CODECS = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "q4_0", "q8_0"]


@pytest.mark.slow  # every format at every effort
@pytest.mark.parametrize("name", always("q2_k", "q4_k", "iq4_nl", "q8_0", of=CODECS))
def test_effort_reaches_the_codec(wide: Path, tmp_path: Path, name: str) -> None:
    recipe = {"q3_k": "q3_k_s", "q4_k": "q4_k_s", "q5_k": "q5_k_s"}.get(name, name)
    errors = {}
    for effort in EFFORTS:
        (written,) = quantize(wide, tmp_path / effort, recipe, effort=effort, measure=True)
        errors[effort] = error_in(written, name)
        assert written.path.stat().st_size == (tmp_path / "fast").stat().st_size
    assert errors["best"] < 0.99 * errors["reference"]
    if name == "q5_k":  # ggml's search counts large weights for more, which costs a little of the plain error here
        assert errors["reference"] == pytest.approx(errors["fast"], rel=0.005)
        assert errors["reference"] != errors["fast"]
    elif name in ("q4_0", "q8_0"):
        assert errors["reference"] == errors["fast"]  # there is nothing to search
    else:
        assert errors["reference"] < errors["fast"]
    quantize(wide, tmp_path / "default", recipe)
    assert (tmp_path / "default").read_bytes() == (tmp_path / "reference").read_bytes()


def test_effort_on_the_command_line(wide: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    sizes = {}
    for effort in EFFORTS:
        file = tmp_path / f"{effort}.json"
        args = ["--effort", effort, "--report", str(file), "-o", str(tmp_path / f"{effort}.gguf")]
        assert run(["quantize", str(wide), "--to", "q2_k", *args]) == 0
        said = json.loads(file.read_text())
        assert said["effort"] == effort
        sizes[effort] = said["components"]["text_encoder"]["groups"]["attn_qk"]["relative_rmse"]
    assert sizes["best"] < sizes["reference"] < sizes["fast"]
    line = refused("quantize", wide, "--to", "q2_k", "--effort", "most", "-o", tmp_path / "out")
    assert "most" in line and "best" in line


# --- What was lost before, and memory


@pytest.mark.parametrize(
    ("before", "to", "noted"),
    [("q8_0", "q4_0", True), ("int8", "q8_0", True), ("q4_0", "q8_0", True), ("fp8", "int8", True),
     ("nf4", "f16", True), ("q4_0", "q4_0", False), ("bf16", "q4_0", False),
     ("f16", "int8", False), ("int8", "int8", False)],
)  # fmt: skip
def test_what_was_lost_before_is_said(tmp_path: Path, tiny: Path, before: str, to: str, noted: bool, capsys) -> None:
    quantize(tiny, tmp_path / "a", before, component="transformer")
    capsys.readouterr()
    assert run(["quantize", str(tmp_path / "a"), "--to", to, "-o", str(tmp_path / "b")]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert len(notes) == noted
    assert not noted or all(words in notes[0] for words in ("transformer", before, to, "start from 16-bit weights"))


@pytest.mark.parametrize("sizes", [[1] * 60, [40] * 12, [100] * 4, [5, 99, 5, 60, 45, 100, 1, 1, 250, 3]])
def test_weights_in_flight_are_bounded(sizes: list[int]) -> None:
    """Whatever the order; only a tensor that is too large by itself goes through alone."""
    limit = convert.IN_FLIGHT_WEIGHTS
    lock, now, most, done = threading.Lock(), [], [], []

    def carry(chunk: Any) -> None:
        with lock:
            now.append(chunk.weights)
            most.append((sum(now), len(now)))
        time.sleep(0.002 * (1 + chunk.number % 3))
        with lock:
            now.remove(chunk.weights)

    chunks = [
        SimpleNamespace(weights=size * limit // 100, number=i, pieces=(), source_bytes=size)
        for i, size in enumerate(sizes)
    ]
    threads = torch.get_num_threads()
    for chunk, _ in convert._run(carry, iter(chunks)):  # type: ignore[arg-type]
        done.append(chunk.number)
    assert sorted(done) == list(range(len(sizes)))
    assert all(total <= limit or count == 1 for total, count in most)
    assert torch.get_num_threads() == threads
    if max(sizes) == 1:
        assert max(count for _, count in most) > 1  # and it does use several threads
