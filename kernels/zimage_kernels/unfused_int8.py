"""8-bit products where Triton has no matrix units (7.5): torch multiplies, a kernel does what follows, in one pass.

The int32 sums go through memory, which the fused kernels spare: 8 bytes for each, written once and read once. In torch
alone, as in the references, all that follows would move 38 bytes for an output of a linear and 98 for one of SwiGLU;
the kernel moves 6 and 10. Rows go in pieces, so that the sums take SUMS_BYTES at most: those of `w1` and `w3` would be
346 MB at 1024x1024. Low-rank terms are torch's products, too, in 16 bits: one rounding more, and 4 bytes for each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import MATRIX_UNITS, OPTIONS, cdiv, jit, tl
from .aot import Variant
from .integer_product import integer_product

Weight = tuple[Tensor, Tensor]  # [N, K] int8, [N] float32
LowRank = tuple[Tensor, Tensor]  # [M, r], [N, r], both of one float dtype
SUMS_BYTES = 2**26
ROW_STEP = 128  # of cuBLAS's tiles, and a multiple of what it takes
TILE = {"BLOCK": 1024, "num_warps": 4}


def unfused_int8(
    x: Tensor, x_scale: Tensor, weight: Weight, other: Weight | None, bias: Tensor | None, scale_log2: int,
    out_dtype: torch.dtype, low_rank: LowRank | None = None, other_low_rank: LowRank | None = None,
) -> Tensor:  # fmt: skip
    """What `linear_int8` gives of one weight, and `swiglu_int8` of two, w1 and w3. Returns [M, N]."""
    outputs = len(weight[0])
    y = torch.empty(len(x), outputs, dtype=out_dtype, device=x.device)
    given = (low_rank, other_low_rank)
    width = 4 * (1 if other is None else 2) + sum(terms[0].itemsize for terms in given if terms is not None)
    step = max(SUMS_BYTES // (width * outputs) // ROW_STEP, 1) * ROW_STEP
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        low = [None if terms is None else (terms[0][rows], terms[1]) for terms in given]
        _unfused_piece(x[rows], x_scale[rows], weight, other, bias, scale_log2, low, y[rows])
    return y


def _unfused_piece(
    x: Tensor, x_scale: Tensor, weight: Weight, other: Weight | None, bias: Tensor | None, scale_log2: int,
    low_rank: list[LowRank | None], y: Tensor,
) -> None:  # fmt: skip
    """A function of its own, so that the sums are gone before the next ones are there."""
    (w, w_scale), (w3, w3_scale) = weight, other or (None, None)
    sums, others = integer_product(x, w), None if w3 is None else integer_product(x, w3)
    # The power of two goes first where the term is part of the result: float16 may not hold it otherwise.
    before = 2.0**scale_log2 if other is None else 1.0
    low, other_low = (None if terms is None else (terms[0] * before) @ terms[1].T for terms in low_rank)
    rows, outputs = y.shape
    _unfused_int8_kernel[(rows, cdiv(outputs, TILE["BLOCK"]))](
        sums, w_scale, others, w3_scale, low, other_low, x_scale, bias, y,
        outputs, sums.stride(0), 2.0**scale_log2, **TILE, **OPTIONS,
    )  # fmt: skip


@jit
def _unfused_int8_kernel(
    sums_ptr: tl.tensor, scale_ptr: tl.tensor, others_ptr: tl.tensor, other_scale_ptr: tl.tensor,
    low_ptr: tl.tensor, other_low_ptr: tl.tensor, x_scale_ptr: tl.tensor, bias_ptr: tl.tensor, y_ptr: tl.tensor,
    outputs: tl.tensor, stride: tl.tensor, factor: tl.float32, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < outputs
    x_scale = tl.load(x_scale_ptr + row)
    place = row * outputs + column
    y = _scaled(sums_ptr + row * stride, x_scale, scale_ptr, column, inside)
    if others_ptr is None:
        if bias_ptr is not None:
            y += _wide(bias_ptr + column, inside)
        y *= factor
        if low_ptr is not None:
            y += _wide(low_ptr + place, inside)
    else:
        value = _scaled(others_ptr + row * stride, x_scale, other_scale_ptr, column, inside)
        if low_ptr is not None:
            y += _wide(low_ptr + place, inside)
        if other_low_ptr is not None:
            value += _wide(other_low_ptr + place, inside)
        y = y / (1.0 + tl.exp(-y)) * value * factor
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _wide(address: tl.tensor, inside: tl.tensor) -> tl.tensor:
    return tl.load(address, mask=inside, other=0).to(tl.float32)


@jit
def _scaled(
    sums_ptr: tl.tensor, x_scale: tl.tensor, scale_ptr: tl.tensor, column: tl.tensor, inside: tl.tensor
) -> tl.tensor:
    """In the order of the fused kernels, so that the roundings are the same."""
    return _wide(sums_ptr + column, inside) * x_scale * tl.load(scale_ptr + column, mask=inside, other=0)


def variants(arch: int) -> list[Variant]:
    """Both ops, in the dtypes of 7.5; newer hardware has the fused kernels."""
    others = {"others_ptr": "*i32", "other_scale_ptr": "*fp32"}
    both = {"low_ptr": "*fp16", "other_low_ptr": "*fp16"}
    uses: dict[str, dict[str, str]] = {
        "linear": {}, "linear bias": {"bias_ptr": ""}, "linear low-rank": {"low_ptr": "*fp16"}, "swiglu": others,
        "swiglu low-rank": others | both,
    }  # fmt: skip
    dtypes = ("fp16", "fp32") if arch < MATRIX_UNITS else ()
    return [_variant(name, optional, dtype) for name, optional in uses.items() for dtype in dtypes]


def _variant(name: str, optional: dict[str, str], dtype: str) -> Variant:
    """Types of optional pointers; an empty one is that of the result."""
    pointers = {"sums_ptr": "*i32", "scale_ptr": "*fp32", "x_scale_ptr": "*fp32", "y_ptr": f"*{dtype}"}
    optional = {pointer: kind or f"*{dtype}" for pointer, kind in optional.items()}
    known = {"others_ptr", "other_scale_ptr", "low_ptr", "other_low_ptr", "bias_ptr"}
    absent = dict.fromkeys(known - set(optional))
    return Variant(
        name=f"unfused_int8 {name} {dtype}",
        kernel=_unfused_int8_kernel,
        signature={**pointers, **optional, "outputs": "i32", "stride": "i32", "factor": "fp32"},
        constexprs={**absent, "BLOCK": TILE["BLOCK"]},
        aligned=(*pointers, *optional, "outputs", "stride"),
        num_warps=TILE["num_warps"],
    )
