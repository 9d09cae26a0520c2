"""The regular Hadamard rotation of ConvRot: spreads outliers over a group, so that 8 bits hold them.

H is the Kronecker power of the 4x4 matrix below, divided by sqrt(group): symmetric and orthogonal, so
rotating twice is the identity, and (x H) (W H)^T = x W^T. Source of the matrix: ConvRot, arXiv 2512.03673.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ._triton import jit, tl

_H4 = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


@cache
def hadamard_matrix(group: int) -> Tensor:
    """H / sqrt(group): [group, group] float32, group a power of 4."""
    h4 = torch.tensor(_H4, dtype=torch.float32)
    h = torch.ones(1, 1)
    while h.shape[0] < group:
        h = torch.kron(h, h4)
    if h.shape[0] != group:
        raise ValueError(f"hadamard group: got {group}, expected a power of 4")
    return h / group**0.5


def hadamard_rotate(x: Tensor, group: int) -> Tensor:
    """Rotate every `group` consecutive elements of the last axis.

    x: [..., K] float, K a multiple of group. Returns x's shape and dtype; its own inverse.
    """
    return (x.unflatten(-1, (-1, group)) @ _matrix_for(group, x.device, x.dtype)).flatten(-2)


@cache
def _matrix_for(group: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """There already: a copy from the CPU would wait for all that a GPU was asked before."""
    with torch.inference_mode(False):
        return hadamard_matrix(group).to(device, dtype, copy=True)


@jit
def rotate_in_registers(x: tl.tensor, SIZE: tl.constexpr, GROUP: tl.constexpr) -> tl.tensor:
    """x H for every GROUP (4, 16, 64 or 256) consecutive elements of x: [SIZE] float32, SIZE a power of two."""
    x = _rotate_digit(x, SIZE, 1)
    if GROUP >= 16:
        x = _rotate_digit(x, SIZE, 4)
    if GROUP >= 64:
        x = _rotate_digit(x, SIZE, 16)
    if GROUP >= 256:
        x = _rotate_digit(x, SIZE, 64)
    return tl.reshape(x, (SIZE,)) * (GROUP**-0.5)


@jit
def _rotate_digit(x: tl.tensor, SIZE: tl.constexpr, STRIDE: tl.constexpr) -> tl.tensor:
    """H4 over four elements that lie STRIDE apart: y[i] = x[i] + x[i^1] + x[i^2] - x[i^3].

    x[i^1] is the sum of the pair minus x[i]. Sums over an axis of 2 are one warp shuffle, or one addition where a
    thread holds both: 4 shuffles an element for a group of 256, and no shared memory.
    """
    x = tl.reshape(x, (SIZE // (4 * STRIDE), 2, 2, STRIDE))
    pair = tl.sum(x, 2, keep_dims=True)
    difference = 2 * x - pair
    return pair + (tl.sum(difference, 1, keep_dims=True) - difference)
