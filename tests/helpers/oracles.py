"""What tests compare with, and how near is near."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.memory.hardware import Hardware
from zimage_lite.model.float16 import stream_dtype
from zimage_lite.model.linear import shapes
from zimage_lite.model.transformer import Transformer
from zimage_lite.pipeline.weights import read_into

PROMPT = "a red circle on a blue background, 你好"


def randomize(model: torch.nn.Module) -> None:
    """Norms near one, linears and convolutions that keep the variance, everything else small but not zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.1)
            elif parameter.ndim >= 2 and "pad_token" not in name and "embed_tokens" not in name:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(0.0, 0.1)


def psnr(a: torch.Tensor, b: torch.Tensor, peak: float) -> float:
    """In decibels."""
    mse = (a.double() - b.double()).square().mean().item()
    return float("inf") if mse == 0 else 10 * torch.log10(torch.tensor(peak**2 / mse)).item()


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """||value - truth|| / ||truth||"""
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


def bound(module: torch.nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    checkpoint = open_checkpoint(folder).restricted_to(shapes(module))
    read_into(module, checkpoint.tensors, Hardware(torch.device("cpu"), dtype))
    return module


def run_transformer(folder: Path, config: Any, inputs: tuple, dtype: torch.dtype) -> list[torch.Tensor]:
    latents, features, t = inputs
    transformer = bound(Transformer(config), folder / "transformer", dtype)
    with torch.inference_mode():
        captions = transformer.refine_captions([feature.to(stream_dtype(dtype)) for feature in features])
        return transformer([latent.to(dtype) for latent in latents], captions, *transformer.modulations(t, dtype))


def transformer_inputs(height: int, width: int, tokens: tuple[int, ...]) -> tuple:
    generator = torch.Generator().manual_seed(5)
    latents = [torch.randn(16, height, width, generator=generator) for _ in tokens]
    features = [torch.randn(n, 128, generator=generator) for n in tokens]
    return latents, features, torch.tensor([0.3])
