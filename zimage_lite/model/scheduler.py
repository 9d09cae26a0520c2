"""What flow matching starts from, tells the model, and makes of two answers. Sigma is 1 for noise and 0 for data."""

from __future__ import annotations

import torch
from torch import Tensor


def model_time(sigma: Tensor) -> Tensor:
    """What the transformer is told: 1 - sigma, [1] float32. By way of 1000 training steps, as diffusers rounds it."""
    return ((1000 - sigma * 1000) / 1000).reshape(1)


def guided(positive: Tensor, negative: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance in diffusers' convention, in which 0 means none (Ho and Salimans, 2022)."""
    return positive + guidance * (positive - negative)


def norm_limited(guided: Tensor, positive: Tensor, most: float) -> Tensor:
    """Guidance that makes the whole image's velocity longer than `most` times what the prompt alone gives is shortened
    to that (diffusers' cfg_normalization)."""
    length, limit = guided.norm(), most * positive.norm()
    return guided * (limit / length).clamp(max=1)


def initial_noise(seed: int, channels: int, height: int, width: int, drawn_before: int = 0) -> Tensor:
    """[channels, height, width] float32, drawn on the CPU so that every device starts from the same noise.
    drawn_before: so many others come first, as diffusers draws for a picture's encoding."""
    generator = torch.Generator("cpu").manual_seed(seed)
    for _ in range(drawn_before):
        torch.randn((1, channels, height, width), generator=generator)
    return torch.randn((1, channels, height, width), generator=generator, dtype=torch.float32)[0]
