"""A part of a model is never taken for the whole, and a whole one is found however its shards and precisions are
named: as diffusers and huggingface_hub name them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from foreign import write_model
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from zimage_lite.checkpoint import safetensors
from zimage_lite.checkpoint.checkpoint import Checkpoint, ModelConfig, open_checkpoint
from zimage_lite.checkpoint.model_files import find_component
from zimage_lite.config import TextEncoderConfig, TransformerConfig
from zimage_lite.convert.catalog import component_shapes
from zimage_lite.convert.complete import open_complete
from zimage_lite.errors import UserError

WHOLE = "name the folder that holds all of them"


def weights(folder: Path) -> dict[str, Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.fixture
def shards(tiny: Path, tmp_path: Path) -> Path:
    """An encoder's folder of three shards and their index, by huggingface_hub."""
    folder = tmp_path / "encoder"
    folder.mkdir()
    save_torch_state_dict(weights(tiny / "text_encoder"), folder, max_shard_size=500_000)
    shutil.copy(tiny / "text_encoder" / "config.json", folder)
    assert sorted(file.name for file in folder.glob("*.safetensors")) == [
        f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)
    ]
    return folder


def same_tensors(found: Checkpoint, wanted: Path) -> bool:
    truth = open_checkpoint(wanted)
    return found.config == truth.config and all(
        (found.tensors[name].read_float() == tensor.read_float()).all() for name, tensor in truth.tensors.items()
    )


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_shard_alone(shards: Path, tiny: Path, tmp_path: Path, refused: Callable[..., str], n: int) -> None:
    """Wherever it lies, with or without its index."""
    alone = tmp_path / f"model-0000{n}-of-00003.safetensors"
    shutil.copy(shards / alone.name, alone)
    for file in (shards / alone.name, alone):
        for command in (
            ("quantize", file, "--to", "q8_0", "-o", tmp_path / "out.gguf"),
            ("generate", "x", "--model", tiny, "--text-encoder", file, "-o", tmp_path / "x.png"),
            ("generate", "x", "--model", file, "-o", tmp_path / "x.png"),
        ):
            line = refused(*command)
            assert line == f"error: {file}: this is part {n} of 3 of a sharded file; {WHOLE}"


def test_a_shard_of_another_name(shards: Path, tiny: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    """Only the index tells. One that names nothing else does no harm."""
    index = shards / "model.safetensors.index.json"
    (shards / "model-00001-of-00003.safetensors").rename(shards / "first.safetensors")
    index.write_text(index.read_text().replace("model-00001-of-00003", "first"))
    line = refused("quantize", shards / "first.safetensors", "--to", "q8_0", "-o", tmp_path / "out.gguf")
    assert f"this is one of the 3 parts in {index.name} of a sharded file; {WHOLE}" in line
    assert same_tensors(open_checkpoint(shards), tiny / "text_encoder")

    (whole,) = (tiny / "text_encoder").glob("*.safetensors")
    one = tmp_path / "model-00001-of-00001.safetensors"
    shutil.copy(whole, one)
    for content in (json.dumps({"weight_map": dict.fromkeys(weights(tiny / "text_encoder"), one.name)}), "{"):
        (tmp_path / index.name).write_text(content)
        assert same_tensors(open_checkpoint(one), tiny / "text_encoder")


def test_shards_without_their_index(shards: Path, tiny: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    """Their names say whether all are there; so they do in ComfyUI's folders."""
    (shards / "model.safetensors.index.json").unlink()
    assert same_tensors(open_checkpoint(shards), tiny / "text_encoder")
    comfy = tmp_path / "comfy"
    shutil.copytree(tiny, comfy)
    shutil.rmtree(comfy / "text_encoder")
    shutil.copytree(shards, comfy / "clip", ignore=shutil.ignore_patterns("*.json"))
    found = find_component(comfy, "text_encoder")
    assert found == comfy / "clip" and same_tensors(open_checkpoint(found), tiny / "text_encoder")
    (shards / "model-00002-of-00003.safetensors").unlink()
    line = refused("quantize", shards, "--to", "q8_0", "-o", tmp_path / "out.gguf")
    assert f"{shards / 'model-00002-of-00003.safetensors'}: this shard is missing" in line


@pytest.mark.parametrize("spelling", ["as saved", "before"])
def test_variants(diffusers_pipeline: Any, diffusers_folder: Path, tmp_path: Path, spelling: str) -> None:
    """fp16 shards alone, under both spellings that diffusers knows; beside plain files they are left alone."""
    model = tmp_path / "model"
    diffusers_pipeline.save_pretrained(model, variant="fp16", max_shard_size="3MB")
    folder = model / "transformer"
    index = folder / "diffusion_pytorch_model.safetensors.index.fp16.json"
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    assert index.exists() and len(names) > 2 and all(".fp16" in name for name in names)
    if spelling == "before":
        respelled = lambda n: n.replace(".fp16", "").replace("diffusion_pytorch_model", "diffusion_pytorch_model.fp16")  # noqa: E731
        for name in names:
            (folder / name).rename(folder / respelled(name))
        text = index.read_text()
        for name in names:
            text = text.replace(name, respelled(name))
        index.unlink()
        index = folder / "diffusion_pytorch_model.fp16.safetensors.index.json"
        index.write_text(text)
    assert same_tensors(open_checkpoint(folder), diffusers_folder / "transformer")

    (plain,) = (diffusers_folder / "transformer").glob("*.safetensors")
    shutil.copy(plain, folder)
    for file in folder.glob("*fp16-*"):
        file.write_bytes(b"not read")
    assert same_tensors(open_checkpoint(folder), diffusers_folder / "transformer")


# --- What a true width tells. Headers only: nothing else of a file is looked at.


def header_only(path: Path, config: ModelConfig, without: str = " ") -> tuple[Path, dict[Path, int]]:
    """A file with the tensors that a component of this size has, but those that begin with `without`; and its size."""
    shapes = {name: shape for name, shape in component_shapes(config).items() if not name.startswith(without)}
    header, _ = safetensors.encode_header([(name, "BF16", shape) for name, shape in shapes.items()], {})
    path.write_bytes(header)
    last = max(info["data_offsets"][1] for info in json.loads(header[8:]).values())
    return path, {path: len(header) + last}


BLOCKS = [
    (TransformerConfig(), "layers.29.", "n_layers: got 29, expected 30"),
    (TransformerConfig(n_layers=31), " ", "n_layers: got 31, expected 30"),
    (TransformerConfig(n_refiner_layers=1), " ", "n_refiner_layers: got 1, expected 2"),
    (TransformerConfig(), "noise_refiner.1.", "tensor noise_refiner.1."),
    (TransformerConfig(), "context_refiner.1.", "tensor context_refiner.1."),
    (TransformerConfig(), "layers.7.", "tensor layers.7."),
    (TextEncoderConfig(num_hidden_layers=34), " ", "num_hidden_layers: got 34, expected 36"),
    (TextEncoderConfig(num_hidden_layers=37), " ", "num_hidden_layers: got 37, expected 36"),
]


@pytest.mark.parametrize(("config", "without", "message"), BLOCKS)
def test_lost_blocks(tmp_path: Path, config: ModelConfig, without: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        open_complete(*as_arguments(*header_only(tmp_path / "a.safetensors", config, without)))
    assert message in str(caught.value)


def as_arguments(path: Path, sizes: dict[Path, int]) -> tuple[Path, None, dict[Path, int]]:
    return path, None, sizes


@pytest.mark.parametrize(("config", "without"), [
    (TransformerConfig(), " "), (TextEncoderConfig(), " "), (TextEncoderConfig(), "layers.35."),
    (TextEncoderConfig(vocab_size=151_669), " "),  # every token has a row
    (TransformerConfig(dim=2560, n_heads=20, n_layers=7), " "),
    (TextEncoderConfig(hidden_size=1024, num_hidden_layers=28), " "),
])  # fmt: skip
def test_nothing_is_lost(tmp_path: Path, config: ModelConfig, without: str) -> None:
    """The last layer of the encoder is never used, and other widths have other numbers of blocks."""
    found = open_complete(*as_arguments(*header_only(tmp_path / "a.safetensors", config, without)))
    assert found.config == config


@pytest.mark.parametrize("config", [TransformerConfig(n_layers=3), TextEncoderConfig(num_hidden_layers=5)])
def test_a_config_may_say_another_size(tmp_path: Path, config: ModelConfig) -> None:
    sizes = header_only(tmp_path / "a.safetensors", config)[1]
    (tmp_path / "config.json").write_text(json.dumps(vars(config)))
    assert open_complete(tmp_path, None, sizes).config == config


def test_lost_blocks_on_the_command_line(tmp_path: Path, refused: Callable[..., str]) -> None:
    """A file of the true size, all holes."""
    path, sizes = header_only(tmp_path / "cut.safetensors", replace(TransformerConfig(), n_layers=29))
    with open(path, "r+b") as file:
        file.truncate(sizes[path])
    line = refused("quantize", path, "--to", "q8_0", "-o", tmp_path / "out.gguf")
    assert "n_layers: got 29, expected 30, as a model of this width has; get the whole file" in line


def test_lost_refiner_and_resnets_of_a_small_model(tmp_path: Path) -> None:
    """What a part has fewer of than another part is missing, whatever the width."""
    model = write_model(tmp_path / "model", n_layers=1)
    for component, lost in (("transformer", "noise_refiner.0."), ("vae", "decoder.up_blocks.0.resnets.1.")):
        tensors = {name: t for name, t in weights(model / component).items() if not name.startswith(lost)}
        assert len(tensors) < len(weights(model / component))
        save_file(tensors, tmp_path / "cut.safetensors")
        with pytest.raises(UserError, match="missing"):
            open_complete(tmp_path / "cut.safetensors")
