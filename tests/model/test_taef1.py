"""TAEF1's decoder against diffusers' AutoencoderTiny, in all the files that hold it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import randomize
from safetensors.torch import save_file
from torch import Tensor

from zimage_lite.checkpoint.taef1 import open_taef1
from zimage_lite.errors import UserError
from zimage_lite.memory.hardware import Hardware
from zimage_lite.model.linear import shapes
from zimage_lite.model.taef1 import TinyDecoder
from zimage_lite.pipeline.weights import Component, read_into


@pytest.fixture(scope="module")
def theirs() -> Any:
    from diffusers import AutoencoderTiny

    torch.manual_seed(2)
    model = AutoencoderTiny(latent_channels=16, scaling_factor=1.0, shift_factor=0.0).eval()
    randomize(model)
    return model


def of(model: Any, part: str, shift: int = 0, prefix: str = "") -> dict[str, Tensor]:
    """The weights of "encoder" or "decoder" as the original spells them: numbers of layers, from `shift` on."""
    found = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(f"{part}.layers."):
            layer, _, rest = name.removeprefix(f"{part}.layers.").partition(".")
            found[f"{prefix}{int(layer) + shift}.{rest}"] = tensor.contiguous()
    return found


def spellings(model: Any) -> dict[str, Mapping[str, Tensor]]:
    joined = of(model, "encoder", 0, "taesd_encoder.") | of(model, "decoder", 1, "taesd_decoder.")
    return {
        "diffusers": model.state_dict(),
        "original": of(model, "decoder", 1),
        "decoder alone, diffusers' numbers": of(model, "decoder", 0, "decoder.layers."),
        "ComfyUI": joined | {"vae_scale": torch.tensor(0.3611), "vae_shift": torch.tensor(0.1159)},
        "prefixed": {f"tae.{name}": tensor for name, tensor in model.state_dict().items()},
        "half": {name: tensor.half() for name, tensor in of(model, "decoder", 1).items()},
    }


def loaded(path: Path) -> TinyDecoder:
    decoder = TinyDecoder()
    read_into(decoder, Component(decoder, open_taef1(path), ()).rest, Hardware(torch.device("cpu"), torch.float32))
    return decoder


@pytest.mark.parametrize("spelling", range(6))
def test_it_is_diffusers(theirs: Any, tmp_path: Path, spelling: int) -> None:
    name, tensors = list(spellings(theirs).items())[spelling]
    save_file(dict(tensors), tmp_path / "taef1.safetensors")
    latent = 3 * torch.randn(16, 6, 10)
    with torch.inference_mode():
        ours = loaded(tmp_path / "taef1.safetensors")(latent)
        wanted = theirs.decode(latent[None]).sample[0]
    assert ours.shape == (3, 48, 80)
    error = (ours - wanted).abs().max() / wanted.abs().max()
    assert error <= (2e-3 if name == "half" else 1e-6), name  # float16 keeps 11 bits


def test_its_names_are_diffusers(theirs: Any) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in theirs.decoder.state_dict().items()}
    assert shapes(TinyDecoder()) == wanted


def refusal(tmp_path: Path, tensors: Mapping[str, Tensor]) -> str:
    save_file(dict(tensors), tmp_path / "some.safetensors")
    with pytest.raises(UserError) as refused:
        loaded(tmp_path / "some.safetensors")
    return str(refused.value)


def test_what_is_no_decoder_is_refused(theirs: Any, tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    assert "takes: got 3, expected 16" in refusal(tmp_path, of(theirs, "encoder"))
    assert "takes: got 4, expected 16" in refusal(tmp_path, of(AutoencoderTiny(), "decoder", 1))  # SD's
    assert "no tiny decoder" in refusal(tmp_path, {"decoder.conv_in.weight": torch.zeros(512, 16, 3, 3)})
    assert "missing" in refusal(tmp_path, dict(list(of(theirs, "decoder", 1).items())[:-1]))
    (tmp_path / "taef1_decoder.pth").write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(UserError, match=r"taef1_decoder\.pth"):
        open_taef1(tmp_path / "taef1_decoder.pth")
