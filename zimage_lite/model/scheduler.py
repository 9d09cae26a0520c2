"""What flow matching starts from, tells the model, and makes of two answers. Sigma is 1 for noise and 0 for data."""

from __future__ import annotations

import torch
from torch import Tensor

from .schedules import simple as sigmas

__all__ = ["euler_step", "guided", "initial_noise", "model_time", "sigmas"]


def model_time(sigma: Tensor) -> Tensor:
    """What the transformer is told: 1 - sigma, [1] float32. By way of 1000 training steps, as diffusers rounds it."""
    return ((1000 - sigma * 1000) / 1000).reshape(1)


def euler_step(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """x: [channels, height, width] float32; velocity: noise - data, same shape; sigma, sigma_next: scalars."""
    return x + (sigma_next - sigma) * velocity


def guided(positive: Tensor, negative: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance in diffusers' convention, in which 0 means none (Ho and Salimans, 2022)."""
    return positive + guidance * (positive - negative)


def initial_noise(seed: int, channels: int, height: int, width: int) -> Tensor:
    """[channels, height, width] float32, drawn on the CPU so that every device starts from the same noise."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((1, channels, height, width), generator=generator, dtype=torch.float32)[0]
