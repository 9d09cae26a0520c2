"""Angles for rotary embeddings. Computed in float64 and rounded once, so they are the same on every device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]  # cos, sin: [tokens, head_dim / 2] float32


def rope_angles(positions: Tensor, axes_dims: Sequence[int], theta: float) -> Rope:
    """positions: [tokens, axes] integers; axis i turns axes_dims[i] / 2 pairs of each head."""
    angles = []
    for position, dim in zip(positions.double().unbind(1), axes_dims, strict=True):
        frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
        angles.append(torch.outer(position, frequencies).float())
    both = torch.cat(angles, dim=1)
    return both.cos(), both.sin()


def grid_positions(size: tuple[int, int, int], start: tuple[int, int, int]) -> Tensor:
    """Positions of a size[0] x size[1] x size[2] box that starts at `start`, last axis fastest: [tokens, 3]."""
    axes = [torch.arange(first, first + length) for first, length in zip(start, size, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
