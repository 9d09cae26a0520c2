"""Flow matching by Euler steps: x moves from noise (sigma 1) to data (sigma 0) along the predicted velocity."""

from __future__ import annotations

import torch
from torch import Tensor


def sigmas(steps: int, shift: float) -> Tensor:
    """[steps + 1] float32 from 1 to 0: evenly spaced, then bent towards noise by s -> shift s / (1 + (shift - 1) s)
    (Esser et al., 2024, eq. 23)."""
    even = torch.linspace(1.0, 1.0 / steps, steps)
    return torch.cat([shift * even / (1 + (shift - 1) * even), torch.zeros(1)])


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
