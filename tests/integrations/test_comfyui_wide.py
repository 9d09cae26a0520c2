"""Blocks of the true width in ComfyUI: our MODEL beside ComfyUI's own loaders on the same files, in every format that
both read. Skipped where COMFYUI names no ComfyUI; GGUF also where COMFYUI_GGUF names no ComfyUI-GGUF."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_server import Comfy
from make_checkpoint import renamed, write_file
from oracles import psnr, relative_error
from safetensors.torch import save_file
from torch import Tensor

from zimage_lite.checkpoint.checkpoint import CONFIG_KEY
from zimage_lite.checkpoint.names import NATIVE_TRANSFORMER
from zimage_lite.config import TransformerConfig
from zimage_lite.convert.catalog import component_shapes
from zimage_lite.convert.quantize import quantize

pytestmark = [pytest.mark.slow, pytest.mark.full_size]  # 2 GB in bf16, minutes

CONFIG = TransformerConfig(n_layers=2)
PLAIN = "wide.safetensors"
_LORA_MODULES = (
    "layers.0.attention.to_q",
    "layers.0.attention.to_v",
    "layers.1.attention.to_out.0",
    "noise_refiner.0.attention.to_k",
)


@pytest.fixture(scope="module")
def wide(comfy_folder: Path) -> Path:
    """A transformer as ComfyUI has it, among its models, and a LoRA of rank 8."""
    file = comfy_folder / "models" / "diffusion_models" / PLAIN
    native = renamed(component_shapes(CONFIG), NATIVE_TRANSFORMER)
    write_file(file, native, torch.bfloat16, 0, "transformer", {CONFIG_KEY: json.dumps(asdict(CONFIG))})
    made = torch.Generator().manual_seed(0)
    lora = {}
    for module in _LORA_MODULES:
        lora[f"diffusion_model.{module}.lora_A.weight"] = torch.randn(8, CONFIG.dim, generator=made) / CONFIG.dim**0.5
        lora[f"diffusion_model.{module}.lora_B.weight"] = torch.randn(CONFIG.dim, 8, generator=made) * 0.3
    save_file(lora, comfy_folder / "models" / "loras" / "wide_lora.safetensors")
    return file


def sampled(
    comfy: Comfy, loader: dict[str, Any], lora: float = 0.0, cfg: float = 1.0, steps: int = 2, side: int = 128
) -> Tensor:
    prompt = {
        "model": loader,
        "lora": comfy.node(
            "LoraLoaderModelOnly", model=["model", 0], lora_name="wide_lora.safetensors", strength_model=lora
        ),
        "positive": comfy.node("TestRandomConditioning", seed=1, tokens=24),
        "negative": comfy.node("TestRandomConditioning", seed=2, tokens=40),
        "noise": comfy.node("EmptySD3LatentImage", width=side, height=side),
        "sample": comfy.node(
            "KSampler", model=["lora" if lora else "model", 0], positive=["positive", 0], negative=["negative", 0],
            latent_image=["noise", 0], steps=steps, cfg=cfg, sampler_name="euler", scheduler="simple", seed=7,
        ),
        "latent": comfy.node("SaveLatent", samples=["sample", 0]),
    }  # fmt: skip
    return comfy.latent(comfy.wait(comfy.order(prompt), 1800)["latent"])


def ours(comfy: Comfy, name: str) -> dict[str, Any]:
    return comfy.node("ZImageLiteLoadModel", source=f"diffusion_models/{name}")


def theirs(comfy: Comfy, name: str) -> dict[str, Any]:
    kind = "UnetLoaderGGUF" if name.endswith(".gguf") else "UNETLoader"
    return comfy.node(kind, unet_name=name)


def agreement(found: Tensor, wanted: Tensor) -> float:
    """In decibels, of their range."""
    return psnr(found, wanted, float(wanted.max() - wanted.min()))


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_ksampler_on_our_model_is_ksampler_on_theirs(comfy: Comfy, wide: Path, cfg: float) -> None:
    found = agreement(*(sampled(comfy, loader, cfg=cfg) for loader in (ours(comfy, PLAIN), theirs(comfy, PLAIN))))
    print(f"cfg {cfg}: {found:.1f} dB")
    assert found >= 45


def test_a_lora_changes_as_much(comfy: Comfy, wide: Path) -> None:
    changes = [
        sampled(comfy, loader, lora=0.8) - sampled(comfy, loader)
        for loader in (ours(comfy, PLAIN), theirs(comfy, PLAIN))
    ]
    found = relative_error(*changes)
    print(f"the change of a LoRA: {found:.2e}")
    assert found <= 0.01


@pytest.mark.parametrize(
    ("to", "least"),
    [("fp8", 40), ("q8_0", 40), ("q4_k_m", 40), ("iq4_xs", 40), ("q2_k", 40), ("int8", 40), ("int4", 40)],
)
def test_our_files_in_comfyui(comfy: Comfy, wide: Path, to: str, least: float) -> None:
    """What ComfyUI computes from the file, and what we do."""
    if to[:2] in ("q8", "q4", "q2", "iq") and not os.environ.get("COMFYUI_GGUF"):
        pytest.skip("COMFYUI_GGUF does not name a folder of ComfyUI-GGUF")
    written = quantize(wide, wide.with_name(f"wide-{to}{'.gguf' if 'q' in to else '.safetensors'}"), to)
    name = written[0].path.name
    found = agreement(*(sampled(comfy, load(comfy, name), steps=1, side=64) for load in (ours, theirs)))
    print(f"{to}: {found:.1f} dB")
    assert found >= least
