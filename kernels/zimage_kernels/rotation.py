"""The regular Hadamard rotation of ConvRot: spreads outliers over a group, so that 8 bits hold them.

H is the Kronecker power of the 4x4 matrix below, divided by sqrt(group): symmetric and orthogonal, so
rotating twice is the identity, and (x H) (W H)^T = x W^T. Source of the matrix: ConvRot, arXiv 2512.03673.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

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
    h = hadamard_matrix(group).to(x.device, x.dtype)
    return (x.unflatten(-1, (-1, group)) @ h).flatten(-2)
