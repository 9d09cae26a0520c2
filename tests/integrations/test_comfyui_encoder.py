"""Our files of the text encoder in ComfyUI: what it makes of a prompt, and what our CLIP does.

ComfyUI knows Qwen3-4B in its true size alone. Skipped where COMFYUI names no ComfyUI; GGUF also where COMFYUI_GGUF
names no ComfyUI-GGUF."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from comfy_server import Comfy
from make_checkpoint import write_file
from oracles import psnr
from safetensors.torch import load_file
from torch import Tensor

from zimage_lite.config import TextEncoderConfig
from zimage_lite.convert.catalog import component_shapes
from zimage_lite.convert.quantize import quantize

pytestmark = [pytest.mark.slow, pytest.mark.full_size]  # 8 GB in bf16, minutes

PROMPT = "a red fox in the snow, 一只红狐"


@pytest.fixture(scope="module")
def encoder(comfy_folder: Path) -> Path:
    file = comfy_folder / "models" / "text_encoders" / "qwen_3_4b.safetensors"
    wanted = {f"model.{name}": ((name,), shape) for name, shape in component_shapes(TextEncoderConfig()).items()}
    write_file(file, wanted, torch.bfloat16, 0, "text_encoder")
    return file


def encoded(comfy: Comfy, loader: dict[str, object], name: str) -> Tensor:
    prompt = {
        "clip": loader,
        "text": comfy.node("CLIPTextEncode", clip=["clip", 0], text=PROMPT),
        "kept": comfy.node("TestSaveConditioning", conditioning=["text", 0], name=name),
    }
    comfy.wait(comfy.order(prompt), 1800)
    return load_file(comfy.base / "output" / name)["conditioning"]


@pytest.mark.parametrize("to", ["int8", "q8_0"])
def test_our_encoders_in_comfyui(comfy: Comfy, encoder: Path, to: str) -> None:
    if to == "q8_0" and not os.environ.get("COMFYUI_GGUF"):
        pytest.skip("COMFYUI_GGUF does not name a folder of ComfyUI-GGUF")
    end, kind = (".gguf", "CLIPLoaderGGUF") if to == "q8_0" else (".safetensors", "CLIPLoader")
    file = quantize(encoder, encoder.with_name(f"qwen_3_4b-{to}{end}"), to)[0].path
    ours = encoded(comfy, comfy.node("ZImageLiteLoadEncoder", source=f"text_encoders/{file.name}"), f"ours-{to}")
    theirs = encoded(comfy, comfy.node(kind, clip_name=file.name, type="lumina2"), f"theirs-{to}")
    file.unlink()
    assert ours.shape == theirs.shape
    found = psnr(ours, theirs, float(theirs.max() - theirs.min()))
    print(f"{to}: {found:.1f} dB")
    assert found >= 40
