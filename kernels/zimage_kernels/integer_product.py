"""x w^T of 8-bit codes in torch: exact 32-bit sums on every device.

torch hands int8 products on the CPU to oneDNN. Where the CPU has VNNI (or AMX) they are exact, and 4.2 to 4.6 times as
fast as float32 (2 threads of a Zen 4). Where it has not, oneDNN adds pairs of products in 16 bits, which saturate: told
to use AVX2 there, it was off by 6.55e7 where the sum was 6.61e7. Where the CPU itself has AVX2 alone (Zen 2 and 3, most
Intel laptops), without oneDNN, or beside x86, sums are added up one by one, 14 to 40 times slower than float32. In all
these cases a product of our own is tried, and float32 multiplies, in pieces whose sums it holds, where that is no
faster. All are exact: which one is taken changes the time and nothing else.

On CUDA torch wants more than 16 rows, and outputs and columns that are multiples of 8; cuBLAS beyond that has no int8
product on 7.5 for some numbers of rows between (97 to 127 failed on a GTX 1650 where 96 and 128 ran, ComfyUI #16431).
Rows and outputs are filled up to multiples of 32, which all sizes of Z-Image are.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

_CUDA_STEP = 32
_EXACT_COLUMNS = 1024  # 128 * 128 * 1024 = 2^24, up to which float32 has all integers
_TILE_ROWS, _TILE_OUTPUTS = 512, 2048  # 19 MB: the sums twice, and both operands in float32


def integer_product(x: Tensor, w: Tensor) -> Tensor:
    """x: [M, K] int8, w: [N, K] int8 -> [M, N] int32, on CUDA perhaps a view. There K is a multiple of 8."""
    if x.device.type != "cpu":
        return torch._int_mm(_filled(x), _filled(w).T)[: len(x), : len(w)]
    if cpu_product() == "compiled" and (ours := _compiled()):
        return ours.product(x, w)
    return torch._int_mm(x, w.T) if cpu_product() == "torch" else _float_product(x, w)


def scaled_product(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """The same, times x_scale: [M] and w_scale: [N], both float32 -> [M, N] float32."""
    if x.device.type == "cpu" and cpu_product() == "compiled" and (ours := _compiled()):
        return ours.scaled_product(x, x_scale, w, w_scale)
    sums = integer_product(x, w)
    if x.device.type != "cpu":
        return sums.float().mul_(x_scale[:, None]).mul_(w_scale)
    y = sums.view(torch.float32)  # in their own place: page faults of another one took as long as all that follows
    return y.copy_(sums).mul_(x_scale[:, None]).mul_(w_scale)


def _filled(codes: Tensor) -> Tensor:
    """With rows of zeros."""
    missing = -len(codes) % _CUDA_STEP or _CUDA_STEP * (len(codes) == 0)
    return F.pad(codes, (0, 0, 0, missing)) if missing else codes  # without a check it would copy


@cache
def cpu_has_int8_units() -> bool:
    """Whether torch's int8 products are exact on this CPU, and faster than those of float32."""
    return _torch_is_exact() and _is_faster(torch._int_mm, 128, 256, 256)


@cache
def cpu_product() -> Literal["torch", "compiled", "float32"]:
    """What multiplies int8 on this CPU: torch's product, ours, or float32 where neither is faster. Measured, for torch
    does not say on which instructions oneDNN runs. torch's takes 2 ms to decide for, and 25 to decide against; ours 10
    more, half a second of imports, and once some seconds of compiling."""
    if cpu_has_int8_units():
        return "torch"
    ours = _compiled()
    return "compiled" if ours and _is_faster(lambda x, w: ours.product(x, w.T), 96, 512, 768) else "float32"


def cpu_int8_is_faster() -> bool:
    """Than float32."""
    return cpu_product() != "float32"


def _torch_is_exact() -> bool:
    """Asked with the largest codes there are."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    codes = torch.full((128, 256), 127, dtype=torch.int8)
    return bool((torch._int_mm(codes, codes.T) == 256 * 127**2).all())


@cache
def loops_obstacle() -> str | None:
    """Why numba compiles no loops here, or None. Beside a numpy or a Python newer than it knows it cannot be imported,
    and raises whatever it stumbles over."""
    try:
        import numba

        disabled = bool(numba.config.DISABLE_JIT)  # type: ignore[attr-defined]
    except Exception as error:  # noqa: BLE001 - whatever it is
        return f"numba cannot be imported ({error})"
    return "NUMBA_DISABLE_JIT is set" if disabled else None


@cache
def _compiled() -> ModuleType | None:
    """Our own product, if numba can compile it."""
    if loops_obstacle():
        return None
    try:
        from . import integer_product_cpu
    except (ImportError, OSError):
        return None
    return integer_product_cpu if integer_product_cpu.is_exact() else None


def _is_faster(multiply: Callable[[Tensor, Tensor], Tensor], rows: int, outputs: int, columns: int) -> bool:
    """Than float32, on one thread: several wait for each other where other programs run, up to a hundred times as long
    as they multiply. The best of a few, in turns, after one that may unpack code."""
    x, w = torch.ones(rows, columns), torch.ones(columns, outputs)
    codes, w_codes = x.char(), w.T.char().contiguous().T
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = [(_seconds(lambda: multiply(codes, w_codes)), _seconds(lambda: x @ w)) for _ in range(6)][1:]
    finally:
        torch.set_num_threads(threads)
    ours, floats = zip(*times, strict=True)
    return min(ours) < min(floats)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _float_product(x: Tensor, w: Tensor) -> Tensor:
    """In tiles, so that little is held beside the sums: at 1024x1024 whole products would take 350 MB more."""
    total = torch.zeros(len(x), len(w), dtype=torch.int32)
    for rows, sums in zip(x.split(_TILE_ROWS), total.split(_TILE_ROWS), strict=True):
        for outputs, tile in zip(w.split(_TILE_OUTPUTS), sums.split(_TILE_OUTPUTS, 1), strict=True):
            for piece, other in zip(rows.split(_EXACT_COLUMNS, 1), outputs.split(_EXACT_COLUMNS, 1), strict=True):
                tile += (piece.float() @ other.float().T).int()
    return total
