"""8-bit products where Triton has no matrix units (7.5): torch multiplies, a kernel does what follows, in one pass.

The int32 sums go through memory, which the fused kernels spare: 8 bytes for each, written once and read once. In torch
alone, as in the references, all that follows would move 38 bytes for an output of a linear and 98 for one of SwiGLU;
the kernel moves 6 and 10. Rows go in pieces, so that the sums take SUMS_BYTES at most: those of `w1` and `w3` would be
346 MB at 1024x1024.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import MATRIX_UNITS, OPTIONS, cdiv, jit, tl
from .aot import Variant
from .integer_product import integer_product

Weight = tuple[Tensor, Tensor]  # [N, K] int8, [N] float32
SUMS_BYTES = 2**26
ROW_STEP = 128  # of cuBLAS's tiles, and a multiple of what it takes
TILE = {"BLOCK": 1024, "num_warps": 4}


def unfused_int8(
    x: Tensor, x_scale: Tensor, weight: Weight, other: Weight | None, bias: Tensor | None, scale_log2: int,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """What `linear_int8` gives of one weight, and `swiglu_int8` of two, w1 and w3. Returns [M, N]."""
    outputs = len(weight[0])
    y = torch.empty(len(x), outputs, dtype=out_dtype, device=x.device)
    step = max(SUMS_BYTES // (4 * outputs * (1 if other is None else 2)) // ROW_STEP, 1) * ROW_STEP
    for some, scale, place in zip(x.split(step), x_scale.split(step), y.split(step), strict=True):
        if len(some):
            _unfused_piece(some, scale, weight, other, bias, scale_log2, place)
    return y


def _unfused_piece(
    x: Tensor, x_scale: Tensor, weight: Weight, other: Weight | None, bias: Tensor | None, scale_log2: int, y: Tensor
) -> None:
    """A function of its own, so that the sums are gone before the next ones are there."""
    (w, w_scale), (w3, w3_scale) = weight, other or (None, None)
    sums, others = integer_product(x, w), None if w3 is None else integer_product(x, w3)
    rows, outputs = y.shape
    _unfused_int8_kernel[(rows, cdiv(outputs, TILE["BLOCK"]))](
        sums, w_scale, others, w3_scale, x_scale, bias, y,
        outputs, sums.stride(0), 2.0**scale_log2, **TILE, **OPTIONS,
    )  # fmt: skip


@jit
def _unfused_int8_kernel(
    sums_ptr: tl.tensor, scale_ptr: tl.tensor, others_ptr: tl.tensor, other_scale_ptr: tl.tensor,
    x_scale_ptr: tl.tensor, bias_ptr: tl.tensor, y_ptr: tl.tensor,
    outputs: tl.tensor, stride: tl.tensor, factor: tl.float32, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < outputs
    x_scale = tl.load(x_scale_ptr + row)
    y = _scaled(sums_ptr + row * stride, x_scale, scale_ptr, column, inside)
    if others_ptr is not None:
        y = y / (1.0 + tl.exp(-y)) * _scaled(others_ptr + row * stride, x_scale, other_scale_ptr, column, inside)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=inside, other=0).to(tl.float32)
    tl.store(y_ptr + row * outputs + column, (y * factor).to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _scaled(
    sums_ptr: tl.tensor, x_scale: tl.tensor, scale_ptr: tl.tensor, column: tl.tensor, inside: tl.tensor
) -> tl.tensor:
    """In the order of the fused kernels, so that the roundings are the same."""
    sums = tl.load(sums_ptr + column, mask=inside, other=0).to(tl.float32)
    return sums * x_scale * tl.load(scale_ptr + column, mask=inside, other=0)


def variants(arch: int) -> list[Variant]:
    """Both ops, in the dtypes of 7.5; newer hardware has the fused kernels."""
    uses = (("linear", False, False), ("linear bias", False, True), ("swiglu", True, False))
    dtypes = ("fp16", "fp32") if arch < MATRIX_UNITS else ()
    return [_variant(*use, dtype) for use in uses for dtype in dtypes]


def _variant(name: str, swiglu: bool, bias: bool, dtype: str) -> Variant:
    pointers = {"sums_ptr": "*i32", "scale_ptr": "*fp32", "x_scale_ptr": "*fp32", "y_ptr": f"*{dtype}"}
    optional = {"others_ptr": "*i32", "other_scale_ptr": "*fp32"} if swiglu else {}
    optional |= {"bias_ptr": f"*{dtype}"} if bias else {}
    absent = dict.fromkeys({"others_ptr", "other_scale_ptr", "bias_ptr"} - set(optional))
    return Variant(
        name=f"unfused_int8 {name} {dtype}",
        kernel=_unfused_int8_kernel,
        signature={**pointers, **optional, "outputs": "i32", "stride": "i32", "factor": "fp32"},
        constexprs={**absent, "BLOCK": TILE["BLOCK"]},
        aligned=(*pointers, *optional, "outputs", "stride"),
        num_warps=TILE["num_warps"],
    )
