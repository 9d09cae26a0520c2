"""Adapters for a whole model, whatever its size, strong enough to be seen and gentle enough to leave a picture."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from zimage_lite.adapters.spelling import table
from zimage_lite.config import TransformerConfig


def save_lora(
    file: Path, config: TransformerConfig, rank: int = 8, seed: int = 0, ends: tuple[str, ...] = ("",)
) -> Path:
    """As ComfyUI's users have them: on every linear whose name ends so, 5 % of a usual weight. Returns the file."""
    random, tensors = torch.Generator().manual_seed(seed), {}
    targets = {target.module: target for found in table(config).values() for target in found if target.is_linear}
    for module, target in sorted(targets.items()):
        if module.endswith(ends):
            down, up = (rank, target.columns), (target.rows, rank)
            tensors[f"diffusion_model.{module}.lora_A.weight"] = torch.randn(down, generator=random)
            scale = 0.05 * (rank * target.columns) ** -0.5
            tensors[f"diffusion_model.{module}.lora_B.weight"] = scale * torch.randn(up, generator=random)
    save_file(tensors, file)
    return file
