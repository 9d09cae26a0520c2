"""Bit fields and float16 scales of ggml's blocks."""

from __future__ import annotations

import torch
from torch import Tensor


def join_bits(fields: Tensor, width: int) -> Tensor:
    """[..., count, n] uint8 below 2^width -> [..., n]: field j in the bits from j * width on."""
    joined = fields[..., 0, :]
    for j in range(1, fields.shape[-2]):
        joined = joined | (fields[..., j, :] << (width * j))
    return joined


def split_bits(joined: Tensor, width: int) -> Tensor:
    """The inverse: [..., n] uint8 -> [..., 8 / width, n]."""
    shifts = range(0, 8, width)
    return torch.stack([(joined >> shift) & (2**width - 1) for shift in shifts], dim=-2)


def half_bytes(*scales: Tensor) -> Tensor:
    """Each [blocks, 1] float32 -> [blocks, 2 * len] bytes of float16."""
    return torch.cat(scales, dim=1).half().view(torch.uint8)


def read_half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of every block -> [blocks, 1] float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()
