"""Files of ControlNets of random weights, for a tiny model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from zimage_lite.checkpoint.checkpoint import CONFIG_KEY
from zimage_lite.config import ControlConfig
from zimage_lite.convert.catalog import component_shapes

_REFINERS: dict[str, str | None] = {"1.0": None, "2.0": "control_layers", "2.1": "control_noise_refiner"}


def tiny_config(version: str = "2.1", places: tuple[int, ...] = (0, 2), **more: Any) -> ControlConfig:
    """Beside `tiny`, which has three layers."""
    channels = 16 if version == "1.0" else 33
    return ControlConfig(
        channels, places, add_control_noise_refiner=_REFINERS[version], dim=256, n_heads=2, **more
    )  # fmt: skip


def save_control(path: Path, config: ControlConfig, seed: int = 0, zeroed: bool = False) -> Path:
    """In bfloat16. zeroed: it gives no hints. Returns the path."""
    random, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in component_shapes(config).items():
        if "norm" in name:
            values = 1 + 0.1 * torch.randn(shape, generator=random)
        else:
            values = torch.randn(shape, generator=random) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
        tensors[name] = (values * (not zeroed or ".after_proj." not in name)).bfloat16()
    said = {key: value for key, value in asdict(config).items() if value is not None}
    save_file(tensors, path, {CONFIG_KEY: json.dumps(said)})
    return path
