"""Activations in 8 bits: each row rotated, divided by its own scale and rounded. The input of `linear_int8`.

codes * scale = x H. The scale is max|x H| / 127 and rounding is half to even, as for the weights of the format `int8`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import OPTIONS, Backend, jit, tl, use_triton
from .aot import Variant
from .rotation import hadamard_rotate, rotate_in_registers

GROUPS = (0, 4, 16, 64, 256)
WIDEST = 32768  # elements of a row that one program holds in its registers


class Int8Rows(NamedTuple):
    """codes: [rows, K] int8, between -127 and 127; scale: [rows] float32. A row is codes * scale, still rotated."""

    codes: Tensor
    scale: Tensor

    @classmethod
    def empty(cls, rows: int, columns: int, device: torch.device) -> Int8Rows:
        codes = torch.empty(rows, columns, dtype=torch.int8, device=device)
        return cls(codes, torch.empty(rows, dtype=torch.float32, device=device))


def quantize_rows_reference(x: Tensor, group: int) -> Int8Rows:
    wide = x.float()
    if group:
        wide = hadamard_rotate(wide, group)
    scale = (wide.abs().amax(-1) / 127).clamp_(min=1e-30)
    codes = (wide * (1 / scale).unsqueeze(-1)).round_().clamp_(-127, 127)
    return Int8Rows(codes.to(torch.int8), scale)


def quantize_rows(x: Tensor, group: int, backend: Backend = "auto") -> Int8Rows:
    """Rotate groups of a row and quantize the row, in float32.

    x: [rows, K] any float dtype, contiguous, K a multiple of group. group: 4, 16, 64, 256, or 0 for no rotation.
    """
    check_group(x.shape[-1], group)
    if not use_triton(backend, x.device):
        return quantize_rows_reference(x, group)
    out = Int8Rows.empty(len(x), x.shape[1], x.device)
    _quantize_kernel[(len(x),)](x.contiguous(), *out, x.shape[1], group, **row_tile(x.shape[1]), **OPTIONS)
    return out


def check_group(columns: int, group: int) -> None:
    if group not in GROUPS or (group and columns % group):
        raise ValueError(f"rotation group: got {group} for rows of {columns}, expected a divisor of them in {GROUPS}")


def row_tile(columns: int) -> dict[str, int]:
    """One program for each row, which stays in registers: 16 elements a thread, and 32 in rows beyond 8192.

    Raises ValueError for a row too long.
    """
    block = max(1 << (columns - 1).bit_length(), 256)  # the next power of two
    if block > WIDEST:
        raise ValueError(f"row length: got {columns}, expected at most {WIDEST}")
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


@jit
def _quantize_kernel(
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    columns: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    codes, scale = to_int8(x, BLOCK, GROUP)
    tl.store(codes_ptr + row * columns + column, codes, mask=inside)
    tl.store(scale_ptr + row, scale)


@jit
def to_int8(x: tl.tensor, BLOCK: tl.constexpr, GROUP: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """One row, [BLOCK] float32 and zero where it is padded -> codes and scale."""
    if GROUP:
        x = rotate_in_registers(x, BLOCK, GROUP)
    scale = tl.maximum(tl.max(tl.abs(x), 0) / 127, 1e-30)
    codes = x * (1 / scale)
    codes = (codes + 12582912.0) - 12582912.0  # 1.5 * 2^23: float32 has no bits left below 1, and rounds half to even
    return tl.minimum(tl.maximum(codes, -127.0), 127.0).to(tl.int8), scale


def variants(arch: int) -> list[Variant]:
    """The inputs of `out` (3840) and `w2` (10240)."""
    return [
        Variant(
            name=f"quantize {dtype} {columns}",
            kernel=_quantize_kernel,
            signature={"x_ptr": f"*{dtype}", "codes_ptr": "*i8", "scale_ptr": "*fp32", "columns": "i32"},
            constexprs={"GROUP": 256, "BLOCK": row_tile(columns)["BLOCK"]},
            aligned=("x_ptr", "codes_ptr", "scale_ptr", "columns"),
            num_warps=row_tile(columns)["num_warps"],
        )
        for columns in (3840, 10240)
        for dtype in ("fp16", "bf16", "fp32")
        if arch >= 80 or dtype != "bf16"
    ]
