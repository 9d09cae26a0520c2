"""ControlNets by their names and shapes: the released files, in every spelling, cut, and taken for others."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from controls import KINDS, make_control, their_weights
from make_checkpoint import component_shapes, renamed
from stubs import TINY, TRANSFORMER, Shape, write

from zimage_lite.checkpoint import gguf
from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.checkpoint.controlnets import require_goes_with, settings
from zimage_lite.checkpoint.names import NATIVE_TRANSFORMER
from zimage_lite.checkpoint.opening import open_tensor_file
from zimage_lite.cli import run
from zimage_lite.config import ControlConfig, TransformerConfig
from zimage_lite.convert.complete import open_complete
from zimage_lite.errors import UserError, WrongModelError

V1 = ControlConfig(16, (0, 5, 10, 15, 20, 25), add_control_noise_refiner=None)
V2 = ControlConfig(add_control_noise_refiner="control_layers")
V21, LITE = ControlConfig(), ControlConfig(control_layers_places=(0, 10, 20))

# Version -> what it is, and of the released file: tensors, millions of weights.
RELEASED = {
    "1.0": (V1, 136, 1550.8),
    "2.0": (V2, 259, 2950.2),
    "2.1": (V21, 295, 3356.2),
    "2.1 lite": (LITE, 91, 1008.3),
}
REFINER = {name: shape for name, shape in component_shapes(V21).items() if name.startswith("control_noise_refiner.")}


def trained(path: Path, shapes: dict[str, Shape], prefix: str = "") -> Path:
    """A file of zeros, but for one weight of the projection that shows whether a refiner was trained."""
    write(path, shapes)
    if entry := open_tensor_file(path).entries.get(f"{prefix}control_noise_refiner.0.after_proj.weight"):
        with open(path, "r+b") as file:
            file.seek(entry.offset)
            file.write(b"\x80\x3f")
    return path


@pytest.mark.parametrize("version", RELEASED)
def test_released_files_are_told_apart(tmp_path: Path, version: str) -> None:
    config, tensors, millions = RELEASED[version]
    shapes = component_shapes(config)
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes.values())) / 1e6 == pytest.approx(millions, abs=0.05)
    found = open_complete(trained(tmp_path / "x.safetensors", shapes))
    assert (found.component, found.config, found.config.version) == ("controlnet", config, version)
    assert not found.unused and len(found.tensors) == tensors


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "controlnet."])
@pytest.mark.parametrize("version", RELEASED)
def test_other_spellings_are_found(tmp_path: Path, version: str, prefix: str) -> None:
    """With ComfyUI's fused attention, which GGUF files have, too."""
    config = RELEASED[version][0]
    native = {name: shape for name, (_, shape) in renamed(component_shapes(config), NATIVE_TRANSFORMER).items()}
    assert "control_layers.0.attention.qkv.weight" in native
    shapes = {prefix + name: shape for name, shape in native.items()}
    path = trained(tmp_path / "x.safetensors", shapes, prefix)
    assert open_complete(path, "controlnet").config == config


def test_an_untrained_refiner_is_not_used(tmp_path: Path) -> None:
    """Files of 2.0 that carry one have the tensors of 2.1."""
    shapes = component_shapes(V21)
    found = open_complete(write(tmp_path / "x.safetensors", shapes))
    assert found.config == V2
    assert set(found.unused) == set(REFINER) and len(REFINER) == 295 - 259


def test_gguf_without_metadata_is_found(tmp_path: Path) -> None:
    config = ControlConfig(dim=256, n_heads=2, control_layers_places=(0, 10, 20), add_control_noise_refiner=None)
    shapes = component_shapes(config)
    header, offsets = gguf.encode_header([(name, "f16", shape) for name, shape in shapes.items()], {})
    path = tmp_path / "x.gguf"
    path.write_bytes(header + bytes(offsets[-1] + 2**18))
    assert open_complete(path).config == config


@pytest.mark.parametrize("version", KINDS)
def test_a_folder_of_diffusers_is_opened(diffusers_pipeline: Any, tmp_path: Path, version: str) -> None:
    theirs = make_control(diffusers_pipeline.transformer, version)
    for shared in ("t_embedder", "all_x_embedder", "cap_embedder", "rope_embedder", "noise_refiner", "context_refiner"):
        setattr(theirs, shared, None)
    theirs.x_pad_token = theirs.cap_pad_token = None
    theirs.save_pretrained(tmp_path)
    found = open_complete(tmp_path)
    kind = KINDS[version]
    assert found.config.control_layers_places == tuple(kind["control_layers_places"])
    assert found.config.add_control_noise_refiner == kind["add_control_noise_refiner"]
    assert found.config.control_in_dim == kind["control_in_dim"]
    assert {name: t.shape for name, t in found.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in their_weights(theirs).items()
    }


# --- What it wants


@pytest.mark.parametrize(
    ("config", "name", "base", "steps"),
    [
        (V1, "Z-Image-Turbo-Fun-Controlnet-Union.safetensors", False, 9),
        (V2, "Z-Image-Turbo-Fun-Controlnet-Union-2.0.safetensors", False, 25),
        (V21, "Z-Image-Turbo-Fun-Controlnet-Union-2.1.safetensors", False, 25),
        (V21, "Z-Image-Turbo-Fun-Controlnet-Union-2.1-2602-8steps.safetensors", False, 8),
        (LITE, "Z-Image-Turbo-Fun-Controlnet-Tile-2.1-lite-2601-8steps.safetensors", False, 8),
        (V21, "Z-Image-Fun-Controlnet-Union-2.1.safetensors", True, 25),
        (LITE, "Z-Image-Fun-Controlnet-Tile-2.1-lite.safetensors", True, 20),
    ],
)
def test_its_name_says_what_it_wants(config: ControlConfig, name: str, base: bool, steps: int) -> None:
    found = settings(config, name)
    assert (found.base, found.steps) == (base, steps)


def test_inspect_names_its_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "Z-Image-Turbo-Fun-Controlnet-Union-2.1-lite-2602-8steps.safetensors"
    assert run(["inspect", str(trained(tmp_path / name, component_shapes(LITE)))]) == 0
    said = capsys.readouterr().out
    assert f"{name}: Z-Image ControlNet, diffusers safetensors, 91 tensors" in said
    assert "version 2.1 lite, 3 blocks; takes a picture to follow, a mask and the picture to change" in said
    assert "Turbo in 8 steps, at a scale of 0.65 to 1.00" in said


# --- What is refused


def without(shapes: dict[str, Shape], part: str) -> dict[str, Shape]:
    return {name: shape for name, shape in shapes.items() if part not in name}


NET = component_shapes(LITE)
WRONG: dict[str, tuple[dict[str, Shape], str]] = {
    "last blocks cut off": (
        without(component_shapes(V21), "control_layers.14."), "blocks of a ControlNet 2.1 for 33 channels: got 14"
    ),
    "of 1.0": (without(component_shapes(V1), "control_layers.5."), "ControlNet 1.0 for 16 channels: got 5, expected 6"),
    "a block in the middle": (without(NET, "control_layers.1."), "attention.to_q.weight and 16 more missing"),
    "a tensor": (without(NET, "layers.1.after_proj.weight"), "tensor control_layers.1.after_proj.weight missing"),
    "misshapen": (NET | {"control_layers.2.after_proj.weight": (3840, 2)}, "layers.2.after_proj.weight (shape)"),
    "no embedder": (without(NET, "embedder"), "this is a part of a Z-Image ControlNet"),
    "other channels": (NET | {"control_all_x_embedder.2-1.weight": (3840, 128)}, "channels that it sees: got 32"),
    "16 with hints": (NET | {"control_all_x_embedder.2-1.weight": (3840, 64)}, "expected versions 1.0 for 16"),
    "Flux": ({"controlnet_x_embedder.weight": (2, 2)}, "this is a ControlNet for Flux or Qwen-Image"),
    "SDXL": ({"controlnet_cond_embedding.conv_in.weight": (2, 2)}, "this is a ControlNet for Stable Diffusion or SDXL"),
}  # fmt: skip


@pytest.mark.parametrize(("shapes", "message"), WRONG.values(), ids=list(WRONG))
def test_wrong_files_are_refused(tmp_path: Path, shapes: dict[str, Shape], message: str) -> None:
    path = trained(tmp_path / "x.safetensors", shapes)
    with pytest.raises(UserError) as error:
        open_complete(path, "controlnet")
    assert message in str(error.value) and str(error.value).startswith(str(path))
    assert len(str(error.value).splitlines()) == 1


def test_it_is_not_taken_for_a_transformer(tmp_path: Path) -> None:
    control = trained(tmp_path / "control.safetensors", NET)
    with pytest.raises(WrongModelError, match="got a Z-Image ControlNet, expected a Z-Image transformer"):
        open_checkpoint(control, "transformer")
    model = write(tmp_path / "model.safetensors", TRANSFORMER)
    with pytest.raises(WrongModelError, match="got a Z-Image transformer, expected a Z-Image ControlNet"):
        open_checkpoint(model, "controlnet")


@pytest.mark.parametrize(
    ("transformer", "message"),
    [
        (TransformerConfig(dim=256, n_heads=2, axes_dims=(32, 48, 48)), "x: width of the ControlNet: got 3840"),
        (
            TransformerConfig(n_heads=15, axes_dims=(64, 96, 96)),
            "number of heads of the ControlNet: got 30, expected 15",
        ),
        (
            TransformerConfig(n_layers=28),
            "last place among the layers of the ControlNet: got 28, expected less than 28",
        ),
        (
            TransformerConfig(n_refiner_layers=1),
            "last place in the noise refiner of the ControlNet: got 1, expected less",
        ),
    ],
)
def test_every_hint_has_its_place(transformer: TransformerConfig, message: str) -> None:
    require_goes_with(V21, TransformerConfig(), "x")
    require_goes_with(V1, TransformerConfig(n_layers=26, n_refiner_layers=1), "x")  # whose refiner gives no hints
    with pytest.raises(WrongModelError) as error:
        require_goes_with(V21, transformer, "x")
    assert message in str(error.value)


def test_beside_a_transformer_it_is_found_when_asked_for(tmp_path: Path) -> None:
    """Training scripts of its authors save both in one file."""
    config = ControlConfig(dim=256, n_heads=2, control_layers_places=(0, 10, 20), add_control_noise_refiner=None)
    path = write(tmp_path / "x.safetensors", TINY["transformer"] | component_shapes(config))
    assert open_checkpoint(path).component == "transformer"
    assert open_checkpoint(path, "controlnet").component == "controlnet"
