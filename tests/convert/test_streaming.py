"""What is converted, tensor by tensor: the same bytes in any order, and what cannot be converted is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import pytest
import torch
from conversions import (
    TARGETS,
    assert_gguf_holds,
    files_below,
    gguf_type,
    native,
    source_weights,
    written,
)
from marking import always
from oracles import relative_error
from safetensors.torch import load_file, save_file

from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.checkpoint.opening import open_tensor_file
from zimage_lite.cli import run
from zimage_lite.convert import streaming as convert
from zimage_lite.convert.quantize import quantize
from zimage_lite.convert.recipe import target as recipe


@pytest.mark.slow  # a model in every format, several times
@pytest.mark.parametrize(
    "target", always("q4_k_m", "int8", "nf4", of=["q8_0", "q4_k_m", "int8", "int4", "nf4", "qint4"])
)
def test_bytes_depend_neither_on_the_run_nor_on_the_chunks(
    model: Path, outputs: dict[str, Path], target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["quantize", str(model), "--to", target, "-o", str(tmp_path / "again")]) == 0
    # Few rows at a time, but not below 16: a rotation is a matrix product, whose last bits then come out otherwise.
    monkeypatch.setattr(convert, "CHUNK_WEIGHTS", 2**13 if target == "int8" else 4000)
    assert run(["quantize", str(model), "--to", target, "-o", str(tmp_path / "chunks")]) == 0
    wanted = files_below(outputs[target])
    assert files_below(tmp_path / "again") == wanted
    assert files_below(tmp_path / "chunks") == wanted


@pytest.mark.slow
@pytest.mark.parametrize("target", always("int8", of=["q8_0", "int8", "nf4"]))
@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_bytes_do_not_depend_on_the_order_of_the_source(
    model: Path, target: str, component: str, tmp_path: Path
) -> None:
    """Files saved by the safetensors library are sorted by name: k before q, layer 10 before layer 2."""
    (file,) = (model / component).glob("*.safetensors")
    save_file(load_file(file), tmp_path / "sorted.safetensors")
    names = [list(open_tensor_file(path).entries) for path in (file, tmp_path / "sorted.safetensors")]
    assert names[1] == sorted(names[0]) != names[0]
    for source in (file, tmp_path / "sorted.safetensors"):
        assert run(["quantize", str(source), "--to", target, "-o", str(tmp_path / source.stem)]) == 0
    assert (tmp_path / "sorted").read_bytes() == (tmp_path / file.stem).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "source", always("int8", "q4_k_m", "nf4", of=["q8_0", "int8", "f16", "q4_k_m", "int4", "fp8", "nf4", "qint4"])
)
def test_requantizing(outputs: dict[str, Path], source: str, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert run(["quantize", str(written(outputs, source)), "--to", "q4_0", "-o", str(out)]) == 0
    before = open_checkpoint(written(outputs, source)).tensors
    wide = native({name: tensor.read().dequantize() for name, tensor in before.items()})
    kept = "F16" if source == "f16" else "BF16"  # what stays 16-bit stays what it was
    assert_gguf_holds(out, wide, lambda name, tensor: gguf_type(name, tensor, "q4_0").replace("BF16", kept))


@pytest.mark.slow
@pytest.mark.parametrize("target", always("q4_k_m", "int8", of=sorted(set(TARGETS) - {"nf4", "qint4"})))
def test_requantizing_to_the_same_format_copies_the_bytes(
    outputs: dict[str, Path], target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / target
    assert run(["quantize", str(outputs[target]), "--to", target, "-o", str(out)]) == 0
    assert written({target: out}, target).read_bytes() == written(outputs, target).read_bytes()
    assert files_below(out / "text_encoder") == files_below(outputs[target] / "text_encoder")
    assert "note:" not in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_another_dtype_are_not_taken_for_ours(
    outputs: dict[str, Path], dtype: torch.dtype, tmp_path: Path
) -> None:
    """Other programs write them; copied as they are, their bytes would be read as float32."""
    tensors = load_file(written(outputs, "int8"))
    file, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({n: t.to(dtype) if n.endswith("weight_scale") else t for n, t in tensors.items()}, file)
    assert run(["quantize", str(file), "--to", "int8", "-o", str(out)]) == 0
    theirs, ours = open_checkpoint(file).tensors, open_checkpoint(out).tensors
    for name, truth in theirs.items():
        assert relative_error(ours[name].read_float(), truth.read_float()) <= 0.01, name


def damaged_copy(model: Path, out: Path, name: str, value: float) -> Path:
    """A copy of the transformer's file with one weight replaced."""
    tensors = source_weights(model, "transformer")
    tensors[name].view(-1)[-7] = value
    save_file(tensors, out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("target", always("q8_0", "q4_k_m", "int8", "nf4", of=TARGETS))
def test_weights_that_are_not_numbers(model: Path, tmp_path: Path, refused, target: str, value: float) -> None:
    file = damaged_copy(model, tmp_path / "a.safetensors", "layers.10.attention.to_k.weight", value)
    line = refused("quantize", file, "--to", target, "-o", tmp_path / "out")
    assert "layers.10.attention.to_k.weight" in line and "NaN or infinite" in line
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("target", ["q8_0", "q4_0"])
def test_a_scale_that_is_not_a_number(outputs: dict[str, Path], tmp_path: Path, refused, target: str) -> None:
    """Both when blocks are copied and when they are unpacked."""
    file = tmp_path / "a.gguf"
    shutil.copyfile(written(outputs, "q8_0"), file)
    tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == "layers.3.attention.qkv.weight")
    with open(file, "r+b") as opened:
        opened.seek(tensor.data_offset + 34 * 5)
        opened.write(b"\x00\x7e")
    notes = int(target != "q8_0")  # that it was lossy already
    line = refused("quantize", file, "--to", target, "-o", tmp_path / "out", notes=notes)
    assert "layers.3.attention.qkv.weight" in line
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("target", "value", "fits"),
    [("f16", 65504, True), ("f16", 1e5, False), ("q8_0", 1e5, True), ("q8_0", -1e7, False), ("q4_0", 1e6, False),
     ("bf16", 1e30, True), ("int8", 1e30, True), ("bf16", 3.4e38, False)],
)  # fmt: skip
def test_weights_beyond_the_format(model: Path, tmp_path: Path, refused, target: str, value: float, fits: bool) -> None:
    name = "layers.2.attention.to_out.0.weight"
    file = damaged_copy(model, tmp_path / "a.safetensors", name, value)
    out = tmp_path / "out"
    if fits:
        assert run(["quantize", str(file), "--to", target, "-o", str(out)]) == 0
        assert torch.isfinite(open_checkpoint(out).tensors[name].read().dequantize()).all()
        return
    line = refused("quantize", file, "--to", target, "-o", out)
    assert name in line and target in line
    assert list(tmp_path.iterdir()) == [file]


def test_a_head_is_left_out_and_not_counted(model: Path, tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []
    tensors = {name.removeprefix("model."): t for name, t in source_weights(model, "text_encoder").items()}
    save_file({**tensors, "lm_head.weight": torch.ones(320, 128)}, tmp_path / "in.safetensors")
    out = tmp_path / "out.gguf"
    quantize(tmp_path / "in.safetensors", out, "q8_0", progress=lambda *report: reports.append(report))
    total = sum(t.nbytes for t in tensors.values())
    assert reports[-1] == (total, total)
    assert len(gguf.GGUFReader(out).tensors) == len(tensors)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_tensors_of_odd_sizes_are_no_obstacle(model: Path, tmp_path: Path, target: str) -> None:
    """Nor are tensors without a single element, or without an axis."""
    table = torch.arange(15.0).view(3, 5)
    odd = {"five": table[0], "layers.0.table": table, "layers.0.odd.weight": table, "scalar": torch.tensor(3.0)}
    for name, *shape in (("none.weight", 0), ("layers.1.none.weight", 0, 32), ("layers.1.rows.weight", 3, 0)):
        odd[name] = torch.ones(shape)
    odd = {name: tensor.bfloat16() for name, tensor in odd.items()}
    save_file({**source_weights(model, "transformer"), **odd}, tmp_path / "in.safetensors")
    out = tmp_path / "out"
    convert.convert(open_checkpoint(tmp_path / "in.safetensors"), recipe(target), out)  # `quantize` leaves them out
    tensors = open_checkpoint(out).tensors
    for name, truth in odd.items():
        assert tensors[name].shape == tuple(truth.shape)
        tolerance = {"int8": 14 / 127, "fp8": 14 / 16}.get(target, 0) if name == "layers.0.odd.weight" else 0
        torch.testing.assert_close(tensors[name].read().dequantize(), truth.float(), rtol=0, atol=tolerance)
    if recipe(target).suffix == ".gguf":
        assert all(tensor.data_offset % 32 == 0 for tensor in gguf.GGUFReader(out).tensors)
