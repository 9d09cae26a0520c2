"""A narrow float32 matrix as three of 8 bits, for CPUs that multiply 8 bits several times as fast.

With s the largest number of a row over 127, a row is s (p0 + p1 / 254 + p2 / 254^2) to 2^-24 of its largest number,
which is what float32 has itself. So x A^T of 8-bit codes x is three exact products: for rank 32 it took 0.25 ms at 288
tokens of 3840 where float32 took 0.54, and 2.9 ms at 4128 where it took 21, most of them for a float32 copy of x (two
cores of a Sapphire Rapids, VNNI). The error is 0.4 of that of float32 sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .integer_product import cpu_has_int8_units, integer_product

_PLANES = 3
_STEP = 254  # of a plane in the next one: what rounding leaves, half a step at most, is 127 of those


class Planes(NamedTuple):
    """codes: [3 r, K] int8, one plane below the other; scale: [r] float32. For [r, K]."""

    codes: Tensor
    scale: Tensor


def is_faster_in_planes(a: Tensor) -> bool:
    """Whether `project_planes` gains on `project_rows`. a: [r, K]."""
    return a.dtype == torch.float32 and a.device.type == "cpu" and cpu_has_int8_units()


def in_planes(a: Tensor) -> Planes:
    """a: [r, K] float32, contiguous; overwritten, for the planes lie where it was."""
    scale = (a.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    left = a / scale[:, None]
    codes = a.view(torch.int8).view(-1)[: _PLANES * a.numel()].view(-1, a.shape[1])
    for plane in codes.chunk(_PLANES):
        whole = left.round()
        plane.copy_(whole)
        left.sub_(whole).mul_(_STEP)
    return Planes(codes, scale)


def from_planes(a: Planes) -> Tensor:
    """-> [r, K] float32."""
    return _joined(a.codes.float(), 0).mul_(a.scale[:, None])


def project_planes(x: Tensor, x_scale: Tensor, a: Planes) -> Tensor:
    """(x * x_scale) A^T. x: [M, K] int8; x_scale: [M] float32 -> [M, r] float32."""
    return _joined(integer_product(x, a.codes).float(), 1).mul_(a.scale).mul_(x_scale[:, None])


def _joined(planes: Tensor, axis: int) -> Tensor:
    """The sum of planes side by side along the axis, each a step finer than the one before."""
    high, middle, low = planes.chunk(_PLANES, axis)
    return low.div_(_STEP).add_(middle).div_(_STEP).add_(high)
