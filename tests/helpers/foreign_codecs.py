"""What tests of other programs' codecs share.

A float32 product of the same numbers is the same number, so most comparisons are exact. Where weights are rotated, the
order of a sum of 256 may differ: ROTATED is what that can make of float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zimage_lite.quant import bnb, comfy_float, comfy_int, quanto, torchao
from zimage_lite.quant.formats import Codec
from zimage_lite.quant.tensor import TORCH_DTYPES

COMFY = {**comfy_float.CODECS, **comfy_int.CODECS}
CODECS = {**COMFY, **bnb.CODECS, **quanto.CODECS, **torchao.CODECS}
ROTATED = 3e-6  # of the largest weight


def weights(rows: int, columns: int) -> Tensor:
    """Gaussian, with rows and columns of different size as in a trained model, and a few outliers."""
    x = torch.randn(rows, columns) * 0.02 * torch.randn(rows, 1).exp() * (torch.randn(1, columns) / 3).exp()
    return torch.where(torch.rand(rows, columns) < 1e-3, x * 8, x)


def cut(codec: Codec, stored: dict[str, Tensor], columns: int, options: Any, rows: slice) -> Any:
    """What a reader makes of the parts as stored: some rows of the 2-D ones, reshaped as the layout says."""
    layout = codec.layout(rows.stop - rows.start, columns, options)
    parts = {}
    for suffix, part in stored.items():
        shape = layout[suffix][1]
        if len(shape) == 2:
            parts[suffix] = part.reshape(-1, shape[1])[rows.start : rows.start + shape[0]]
        else:
            parts[suffix] = part
    return parts


def as_stored(codec: Codec, parts: dict[str, Tensor], shape: Any, options: Any) -> dict[str, Tensor]:
    """Parts as they go into a file. Checks them against the layout first."""
    layout, stored = codec.layout(*shape, options), codec.stored(*shape, options)
    assert {suffix: (part.dtype, tuple(part.shape)) for suffix, part in parts.items()} == {
        suffix: (TORCH_DTYPES[dtype], part_shape) for suffix, (dtype, part_shape) in layout.items()
    }
    return {suffix: part.contiguous().reshape(stored[suffix]) for suffix, part in parts.items()}


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def as_bytes(part: Tensor) -> Tensor:
    return part.contiguous().reshape(-1).view(torch.uint8)
