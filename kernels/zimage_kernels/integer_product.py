"""x w^T of 8-bit codes in torch: exact 32-bit sums on every device.

torch hands int8 products on the CPU to oneDNN. Where the CPU has VNNI (or AMX) they are exact, and 4.2 to 4.6 times as
fast as float32 (2 threads of a Zen 4). Where it has not, oneDNN adds pairs of products in 16 bits, which saturate: told
to use AVX2 there, it was off by 6.55e7 where the sum was 6.61e7. Where the CPU itself has AVX2 alone (Zen 2 and 3, most
Intel laptops), without oneDNN, or beside x86, sums are added up one by one, 14 to 40 times slower than float32. In all
these cases float32 multiplies instead, in pieces whose sums it holds.

On CUDA torch wants more than 16 rows, and outputs and columns that are multiples of 8; cuBLAS beyond that has no int8
product on 7.5 for some numbers of rows between (97 to 127 failed on a GTX 1650 where 96 and 128 ran, ComfyUI #16431).
Rows and outputs are filled up to multiples of 32, which all sizes of Z-Image are.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

_CUDA_STEP = 32
_EXACT_COLUMNS = 1024  # 128 * 128 * 1024 = 2^24, up to which float32 has all integers
_TRIAL_ROWS = 128
_TILE_ROWS, _TILE_OUTPUTS = 512, 2048  # 19 MB: the sums twice, and both operands in float32


def integer_product(x: Tensor, w: Tensor) -> Tensor:
    """x: [M, K] int8, w: [N, K] int8 -> [M, N] int32, on CUDA perhaps a view. There K is a multiple of 8."""
    if x.device.type != "cpu":
        return torch._int_mm(_filled(x), _filled(w).T)[: len(x), : len(w)]
    return torch._int_mm(x, w.T) if cpu_has_int8_units() else _float_product(x, w)


def _filled(codes: Tensor) -> Tensor:
    """With rows of zeros."""
    missing = -len(codes) % _CUDA_STEP or _CUDA_STEP * (len(codes) == 0)
    return F.pad(codes, (0, 0, 0, missing)) if missing else codes  # without a check it would copy


@cache
def cpu_has_int8_units() -> bool:
    """Whether int8 products on this CPU are exact, and faster than those of float32: measured, for torch does not say
    on which instructions oneDNN runs. Exactness is asked with the largest codes there are; speed with a product of 256
    columns, 0.1 ms where there are units and 2 ms where sums are added up one by one (a Zen 3)."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    codes = torch.full((_TRIAL_ROWS, 256), 127, dtype=torch.int8)
    values = codes.float()
    exact = bool((torch._int_mm(codes, codes.T) == 256 * 127**2).all())
    return exact and _seconds(lambda: torch._int_mm(codes, codes.T)) < _seconds(lambda: values @ values.T)


def _seconds(multiply: Callable[[], Tensor]) -> float:
    """The best of a few: the first may start threads or unpack code."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        multiply()
        times.append(time.perf_counter() - start)
    return min(times)


def _float_product(x: Tensor, w: Tensor) -> Tensor:
    """In tiles, so that little is held beside the sums: at 1024x1024 whole products would take 350 MB more."""
    total = torch.zeros(len(x), len(w), dtype=torch.int32)
    for rows, sums in zip(x.split(_TILE_ROWS), total.split(_TILE_ROWS), strict=True):
        for outputs, tile in zip(w.split(_TILE_OUTPUTS), sums.split(_TILE_OUTPUTS, 1), strict=True):
            for piece, other in zip(rows.split(_EXACT_COLUMNS, 1), outputs.split(_EXACT_COLUMNS, 1), strict=True):
                tile += (piece.float() @ other.float().T).int()
    return total
