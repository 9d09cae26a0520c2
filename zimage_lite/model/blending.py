"""Pictures that are drawn over in part: what is kept, what changes, and tiles that become one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def renoised(x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """x0 as it is at noise level sigma: where flow matching has it on the way from its noise."""
    return sigma * noise + (1 - sigma) * x0


def blended(new: Tensor, kept: Tensor, mask: Tensor | None) -> Tensor:
    """mask: [height, width], 1 where the new counts; None is 1 everywhere."""
    return new if mask is None else torch.lerp(kept, new, mask)


def mask_at(mask: Tensor, sigma: float, first: float) -> Tensor:
    """What of a soft mask may change at noise level sigma, 0 or 1: the brighter, the earlier (Levin and Fried,
    Differential Diffusion, 2023). A hard mask stays as it is. first: the noise level that the run starts from."""
    return ((mask > 0) & (mask >= sigma / first)).to(mask.dtype)


def feathered(pieces: Sequence[Tensor], places: Sequence[tuple[int, int]], height: int, width: int) -> Tensor:
    """pieces: [channels, rows, columns] of one size, whose top left corners lie at `places` (top, left). -> [channels,
    height, width]: where they overlap, their mean, in which each counts less towards its edge (MultiDiffusion,
    Bar-Tal et al., 2023)."""
    channels, rows, columns = pieces[0].shape
    weight = _ramp(rows, pieces[0])[:, None] * _ramp(columns, pieces[0])
    total, weights = pieces[0].new_zeros(channels, height, width), pieces[0].new_zeros(height, width)
    for piece, (top, left) in zip(pieces, places, strict=True):
        total[:, top : top + rows, left : left + columns] += piece * weight
        weights[top : top + rows, left : left + columns] += weight
    return total / weights


def _ramp(length: int, like: Tensor) -> Tensor:
    """From each end to the middle."""
    there = torch.arange(1, length + 1, dtype=like.dtype, device=like.device)
    return torch.minimum(there, there.flip(0))
