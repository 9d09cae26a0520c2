"""Adapters merged into what is converted: of any kind, into any format, on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import trainers
from adapted import Weights
from adapter_files import TINY, Described
from safetensors.torch import save_file

from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.checkpoint.names import NATIVE_TRANSFORMER
from zimage_lite.cli import run
from zimage_lite.config import Lora
from zimage_lite.convert.merging import with_merged
from zimage_lite.convert.output_file import MERGED_KEY
from zimage_lite.convert.quantize import quantize


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return Weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def source(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    save_file(weights.tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.mark.parametrize(
    "describe",
    [trainers.musubi, trainers.native_fused, trainers.loha, trainers.lokr_whole, trainers.rotated_outputs(0.0),
     trainers.rotated_inputs(False, False), trainers.dora_by_length],
)  # fmt: skip
def test_rows_are_those_of_the_merged_weight(describe, weights: Weights, source: Path, tmp_path: Path) -> None:
    """Read in pieces that no rotation's block ends with."""
    described: Described = describe()
    checkpoint = open_checkpoint(source, "transformer")
    assert checkpoint.config == TINY
    merged = with_merged(checkpoint, [Lora(str(described.write(tmp_path)), 1.0)], lambda line: None)
    for module, (change, _) in weights.wanted(described).items():
        tensor = merged.tensors[f"{module}.weight"]
        rows = torch.cat([tensor.read_float(i, min(i + 7, tensor.rows)) for i in range(0, tensor.rows, 7)])
        assert change is not None
        got = rows.double() - weights.of(module).double()
        assert (got - change).norm() <= 1e-5 * change.norm(), module


@pytest.fixture(scope="module")
def fused(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16, under the native names: q, k and v share an array."""
    path = tmp_path_factory.mktemp("fused") / "model.safetensors"
    names = NATIVE_TRANSFORMER.to_foreign(weights.tensors)
    joined = {name: torch.cat([weights.tensors[own] for own in members]) for name, members in names.items()}
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in joined.items()}, path)
    return path


def keys_alone() -> Described:
    made = Described()
    made.lora("diffusion_model.layers.0.attention.to_k", "layers.0.attention.to_k")
    return made


@pytest.mark.parametrize(
    ("name", "describe", "to"),
    [
        ("source", trainers.musubi, "q8_0"),
        ("source", trainers.musubi, "int8"),
        *(("fused", describe, to) for describe in (trainers.musubi, keys_alone) for to in ("bf16", "q8_0", "int8")),
    ],
)
def test_the_file_is_that_of_the_merged_weights(
    request: pytest.FixtureRequest, weights: Weights, tmp_path: Path, name: str, describe, to: str
) -> None:
    """To the byte, whether they are merged on the way or were before."""
    source, adapter = request.getfixturevalue(name), describe().write(tmp_path)
    changed = dict(weights.tensors)
    checkpoint = with_merged(open_checkpoint(source, "transformer"), [Lora(str(adapter), 0.5)], lambda line: None)
    for name, tensor in checkpoint.tensors.items():
        changed[name] = tensor.read_float().view(changed[name].shape)
    save_file(changed, tmp_path / "model.safetensors", {MERGED_KEY: checkpoint.metadata[MERGED_KEY]})
    outs = [tmp_path / f"{name}-out" for name in ("before", "way")]
    quantize(tmp_path / "model.safetensors", outs[0], to)
    quantize(source, outs[1], to, merge_loras=[Lora(str(adapter), 0.5)])
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_a_file_says_what_is_in_it(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what was before, in both containers."""
    adapter = str(trainers.musubi().write(tmp_path, "pencil"))
    quantize(source, tmp_path / "one.safetensors", "int8", merge_loras=[Lora(adapter, 0.5)])
    quantize(tmp_path / "one.safetensors", tmp_path / "two.gguf", "q8_0", merge_loras=[Lora(adapter, -0.25)])
    assert run(["inspect", str(tmp_path / "two.gguf")]) == 0
    assert "    merged into it: pencil at 0.5, pencil at -0.25\n" in capsys.readouterr().out
    assert run(["inspect", str(source)]) == 0
    assert "merged" not in capsys.readouterr().out


def test_a_bias_without_a_place(source: Path, tmp_path: Path, refused) -> None:
    adapter = trainers.biases_of_lora().write(tmp_path)
    line = refused("quantize", source, "--to", "q8_0", "-o", tmp_path / "out.gguf", "--merge-lora", adapter, notes=1)
    assert "no place for one" in line and not (tmp_path / "out.gguf").exists()


def test_the_adapter_is_not_written_over(source: Path, tmp_path: Path, refused) -> None:
    adapter = trainers.musubi().write(tmp_path)
    before = adapter.read_bytes()
    options = ("-o", adapter, "--overwrite", "--merge-lora", adapter)
    assert "its own source" in refused("quantize", source, "--to", "int8", *options, notes=1)
    assert adapter.read_bytes() == before
