"""What is written beside a quantized transformer to take back errors: as others read it, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from zimage_lite.calibration import files
from zimage_lite.calibration.statistics import Moments, Statistics, input_of
from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.checkpoint.model_card import DEMO, model_folder
from zimage_lite.cli import run

RANK = 8
SOME = ("--component", "transformer", "--keep", "layers.2.*")


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of channels of many sizes, which go together."""
    rng, source, inputs = np.random.default_rng(1), open_checkpoint(model_folder(DEMO) / "transformer"), {}
    for name, tensor in source.tensors.items():
        if name == input_of(name) and name.startswith("layers.") and len(tensor.shape) == 2:
            x = rng.normal(0, 1, (600, 32)) @ rng.normal(0, 1, (32, tensor.columns))
            x = (x + rng.normal(0, 1, x.shape)) * np.exp(rng.normal(0, 1, tensor.columns))
            inputs[name] = Moments.empty(tensor.columns, tensor.columns)
            inputs[name].add(torch.from_numpy(x.astype(np.float32)), 0)
    out = tmp_path_factory.mktemp("statistics") / "demo.safetensors"
    files.write(out, Statistics(asdict(source.config), {}, ["a circle"], inputs))
    return out


def repaired(statistics: Path, folder: Path, to: str, *more: str) -> int:
    end = "gguf" if to == "q4_0" else "safetensors"
    known = ("--calibration", str(statistics), "--repair", str(folder / "repair.safetensors"), "--repair-rank", "8")
    return run(["quantize", "demo", "--to", to, "-o", str(folder / f"out.{end}"), *SOME, *known, *more])


@pytest.mark.slow
@pytest.mark.parametrize("to", ["q4_0", "int4", "nf4"])  # q, k and v are one tensor in two of them
def test_errors_are_repaired(statistics: Path, tmp_path: Path, to: str) -> None:
    """Nearly as well as the singular value decomposition says that it can be, counted in float64; in all that was
    quantized and whose inputs are known, and in nothing else."""
    assert repaired(statistics, tmp_path, to) == 0
    found = load_file(tmp_path / "repair.safetensors")
    known = files.read(statistics)
    source = open_checkpoint(model_folder(DEMO) / "transformer").tensors
    (out,) = tmp_path.glob("out.*")
    written = open_checkpoint(out).tensors
    linears = [name for name in source if name.startswith(("layers.0.", "layers.1.")) and len(source[name].shape) == 2]
    assert {key.rpartition(".lora_")[0] for key in found} == {f"transformer.{name[:-7]}" for name in linears}
    for name in linears:
        inputs = known.inputs(name)
        assert inputs is not None and inputs.hessian is not None
        hessian = torch.block_diag(*inputs.hessian).double().numpy()
        down, up = (found[f"transformer.{name[:-7]}.lora_{factor}.weight"] for factor in "AB")
        assert down.dtype == up.dtype == torch.bfloat16 and down.shape[0] == up.shape[1] == RANK
        gap = (source[name].read_float() - written[name].read_float()).double().numpy()
        root = np.linalg.cholesky(hessian + 1e-9 * np.trace(hessian) * np.eye(len(hessian)))
        least = np.square(np.linalg.svd(gap @ root, compute_uv=False)[RANK:]).sum()
        rest = gap - up.double().numpy() @ down.double().numpy()
        assert np.trace(rest @ hessian @ rest.T) < 1.02 * least, name


@pytest.mark.slow  # loads diffusers
def test_diffusers_takes_it(statistics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    assert repaired(statistics, tmp_path, "int4") == 0
    model: Any = diffusers.ZImageTransformer2DModel.from_pretrained(model_folder(DEMO) / "transformer")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = load_file(tmp_path / "repair.safetensors")
    model.load_lora_adapter(dict(found), prefix="transformer")
    model.fuse_lora()
    model.unload_lora()
    for name, tensor in model.state_dict().items():
        module = f"transformer.{name.removesuffix('.weight')}"
        factors = [found.get(f"{module}.lora_{factor}.weight") for factor in "BA"]
        change = factors[0].float() @ factors[1].float() if factors[0] is not None else torch.zeros(())
        assert torch.allclose(tensor, before[name] + change, atol=1e-6), name
    assert run(["inspect", str(tmp_path / "repair.safetensors")]) == 0
    assert "ranks          8 on 16" in capsys.readouterr().out


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_nothing_is_left_of_either(
    statistics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    def failing(*given: Any) -> None:
        raise failure

    monkeypatch.setattr("zimage_lite.convert.repair.low_rank", failing)
    assert repaired(statistics, tmp_path, "q4_0") in (2, 130)
    assert not list(tmp_path.iterdir())


def test_refusals(
    statistics: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, known = tmp_path / "out", ("--calibration", str(statistics))
    inside, taken, good = out / "repair.safetensors", tmp_path / "taken.safetensors", tmp_path / "repair.safetensors"
    taken.write_bytes(b"")
    for given, said in (
        (("--repair", str(good)), "add --calibration STATS"),
        (("--repair", str(tmp_path / "repair.gguf"), *known), "a name that ends in .safetensors"),
        (("--repair", str(taken), *known), f"{taken} exists already; choose another name with --repair"),
        (("--repair", str(tmp_path / "no" / "x.safetensors"), *known), "or choose another place with --repair"),
        (("--repair-rank", "4", *known), "add --repair FILE"),
        (("--repair", str(good), *known, "--component", "transformer", "--keep", "layers.*"), "nothing to repair"),
    ):
        assert said in refused("quantize", "demo", "--to", "q4_0", "-o", str(out), *given), given
    assert list(tmp_path.iterdir()) == [taken]
    out.mkdir()
    given = ("--repair", str(inside), *known, "--overwrite")
    assert "lies in the output" in refused("quantize", "demo", "--to", "q4_0", "-o", str(out), *given)
    assert not list(out.iterdir())
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    given = ("--repair", str(folder), *known, "--overwrite")
    monkeypatch.setattr("zimage_lite.convert.streaming.convert", None)  # nothing is computed before
    assert "name the file to write with --repair" in refused("quantize", "demo", "--to", "q4_0", "-o", out, *given)


def test_statistics_are_not_written_over(statistics: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    """Not by the LoRA, the report or the output, whatever link they are named by."""
    known, link = tmp_path / "known.safetensors", tmp_path / "link.safetensors"
    known.write_bytes(statistics.read_bytes())
    link.symlink_to(known)
    given = ("quantize", "demo", *SOME, "--calibration", known, "--overwrite")
    for name in (known, link):
        out = ("--to", "int4", "-o", tmp_path / "out.safetensors")
        for outputs, flag in (
            ((*out, "--repair", name), "--repair"),
            ((*out, "--report", name), "--report"),
            (("--to", "int4", "-o", name), "-o"),
            (("--to", "auto:5bpw", "-o", tmp_path / "out.gguf", "--repair", name), "--repair"),
        ):
            line = refused(*given, *outputs)
            assert f"{name}: the output would replace its own source; choose another name with {flag}" in line
    assert known.read_bytes() == statistics.read_bytes() and link.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {known.name, link.name}
