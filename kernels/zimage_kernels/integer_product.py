"""x w^T of 8-bit codes in torch: exact 32-bit sums on every device.

torch hands int8 products on the CPU to oneDNN. Where the CPU has VNNI (or AMX) they are exact and 4 times as fast as
float32. Where it has not, oneDNN adds pairs of products in 16 bits, which saturate: with AVX2, codes of 127 gave a
quarter of their sum. There float32 multiplies, in pieces whose sums it holds.
"""

from __future__ import annotations

import platform
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

_EXACT_COLUMNS = 1024  # 128 * 128 * 1024 = 2^24, below which float32 has all integers


def integer_product(x: Tensor, w: Tensor) -> Tensor:
    """x: [M, K] int8, w: [N, K] int8 -> [M, N] int32. On CUDA torch wants N and K to be multiples of 8."""
    rows = len(x)
    if x.is_cuda and rows <= 16:  # torch wants more
        x = F.pad(x, (0, 0, 0, 17 - rows))
    if x.device.type == "cpu" and not _is_exact():
        return _float_product(x, w)
    return torch._int_mm(x, w.T)[:rows]


def cpu_has_int8_units() -> bool:
    """Whether int8 products on this CPU are faster than those of float32. Beside x86, torch adds them up one by one."""
    return platform.machine().lower() in ("x86_64", "amd64") and _is_exact()


@cache
def _is_exact() -> bool:
    """Asked with the largest codes there are, for torch does not say on which instructions oneDNN runs."""
    codes = torch.full((64, 256), 127, dtype=torch.int8)
    return bool((torch._int_mm(codes, codes.T) == 256 * 127**2).all())


def _float_product(x: Tensor, w: Tensor) -> Tensor:
    total = torch.zeros(len(x), len(w), dtype=torch.int32)
    for piece, other in zip(x.split(_EXACT_COLUMNS, 1), w.split(_EXACT_COLUMNS, 1), strict=True):
        total += (piece.float() @ other.float().T).int()
    return total
