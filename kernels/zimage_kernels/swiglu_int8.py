"""silu(x W1^T) * (x W3^T) from 8-bit codes, both products in one pass over x.

Apart, the two [M, 10240] results of Z-Image's feed-forward would be written, read, and written again: 638 MB of a
block's traffic at 1024x1024. Here they never leave the registers. What `linear_int8` says of scales holds here too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import OPTIONS, Backend, cdiv, has_matrix_units, jit, tl, use_triton
from .aot import Variant
from .linear_int8 import LowRank, check_operands, dequantized, grouped_tile, linear_int8_reference, rank_operands
from .tuning import Tile, tile, tiles
from .unfused_int8 import unfused_int8


def swiglu_int8(
    x: Tensor,
    x_scale: Tensor,
    w1: Tensor,
    w1_scale: Tensor,
    w3: Tensor,
    w3_scale: Tensor,
    low_rank1: LowRank | None = None,
    low_rank3: LowRank | None = None,
    scale_log2: int = 0,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: Backend = "auto",
) -> Tensor:
    """silu(x W1^T + xA1 B1^T) * (x W3^T + xA3 B3^T) * 2^scale_log2, x, W1 and W3 each times its scales.

    x: [M, K] int8; x_scale: [M] float32; w1, w3: [N, K] int8; w1_scale, w3_scale: [N] float32.
    low_rank1, low_rank3: (xA [M, r], B [N, r]), float16 or bfloat16 both.
    K is a multiple of 16, any M and N. Returns [M, N] in out_dtype: bfloat16, float16 or float32.
    """
    rows, columns, outputs = check_operands(x, x_scale, w1, w1_scale, low_rank1)
    check_operands(x, x_scale, w3, w3_scale, low_rank3)
    if len(w3) != outputs:
        raise ValueError(f"w3: got {len(w3)} rows, expected {outputs} as w1 has")
    kernels = use_triton(backend, x.device)
    fused = kernels and has_matrix_units(x.device)
    if kernels and not fused:
        weights = (w1, w1_scale), (w3, w3_scale)
        return unfused_int8(x, x_scale, *weights, None, scale_log2, out_dtype, low_rank1, low_rank3)
    if not fused:
        return swiglu_int8_reference(
            x, x_scale, w1, w1_scale, w3, w3_scale, low_rank1, low_rank3, scale_log2, out_dtype
        )
    y = torch.empty(rows, outputs, dtype=out_dtype, device=x.device)
    chosen = tile("swiglu_int8", rows, x.device)
    even = columns % chosen["BLOCK_K"] == 0
    grid = (cdiv(rows, chosen["BLOCK_M"]) * cdiv(outputs, chosen["BLOCK_N"]),)
    xa1, b1, rank1 = rank_operands(low_rank1)
    xa3, b3, rank3 = rank_operands(low_rank3)
    _swiglu_int8_kernel[grid](
        x, x_scale, w1, w1_scale, w3, w3_scale, xa1, b1, xa3, b3, y,
        rows, outputs, columns, rank1, rank3, 2.0**scale_log2, even, **chosen, **OPTIONS,
    )  # fmt: skip
    return y


def swiglu_int8_reference(
    x: Tensor,
    x_scale: Tensor,
    w1: Tensor,
    w1_scale: Tensor,
    w3: Tensor,
    w3_scale: Tensor,
    low_rank1: LowRank | None = None,
    low_rank3: LowRank | None = None,
    scale_log2: int = 0,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The definition of `swiglu_int8`, in torch."""
    gate = linear_int8_reference(x, x_scale, w1, w1_scale, low_rank=low_rank1, out_dtype=torch.float32)
    value = linear_int8_reference(x, x_scale, w3, w3_scale, low_rank=low_rank3, out_dtype=torch.float32)
    return F.silu(gate, inplace=True).mul_(value).mul_(2.0**scale_log2).to(out_dtype)


@jit
def _swiglu_int8_kernel(
    x_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    w1_ptr: tl.tensor,
    w1_scale_ptr: tl.tensor,
    w3_ptr: tl.tensor,
    w3_scale_ptr: tl.tensor,
    xa1_ptr: tl.tensor,
    b1_ptr: tl.tensor,
    xa3_ptr: tl.tensor,
    b3_ptr: tl.tensor,
    y_ptr: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    columns: tl.tensor,
    rank1: tl.tensor,
    rank3: tl.tensor,
    factor: tl.tensor,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    tile_m, tile_n = grouped_tile(rows, outputs, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = (m[:, None] < rows) & (n[None, :] < outputs)
    m_read, n_read = tl.minimum(m, rows - 1), tl.minimum(n, outputs - 1)  # so that loads need no mask
    x_ptrs = x_ptr + m_read[:, None] * columns + k[None, :]
    w_offsets = n_read[None, :] * columns + k[:, None]
    acc1 = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    acc3 = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, columns, BLOCK_K):
        if EVEN_K:
            x, w1, w3 = tl.load(x_ptrs), tl.load(w1_ptr + w_offsets), tl.load(w3_ptr + w_offsets)
        else:
            left = columns - start
            x = tl.load(x_ptrs, mask=k[None, :] < left, other=0)
            w1 = tl.load(w1_ptr + w_offsets, mask=k[:, None] < left, other=0)
            w3 = tl.load(w3_ptr + w_offsets, mask=k[:, None] < left, other=0)
        acc1 = tl.dot(x, w1, acc1, out_dtype=tl.int32)
        acc3 = tl.dot(x, w3, acc3, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        w_offsets += BLOCK_K
    gate = dequantized(acc1, x_scale_ptr, w1_scale_ptr, xa1_ptr, b1_ptr, m_read, n_read, rank1)
    value = dequantized(acc3, x_scale_ptr, w3_scale_ptr, xa3_ptr, b3_ptr, m_read, n_read, rank3)
    y = gate / (1.0 + tl.exp(-gate)) * value * factor
    tl.store(y_ptr + m[:, None] * outputs + n[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


def variants(arch: int) -> list[Variant]:
    """Every tile plain and with both low-rank terms, and the first one with a ragged K."""
    listed = []
    for number, chosen in enumerate(tiles("swiglu_int8", arch)):
        for full, even in ((False, True), (True, True), *([(False, False)] if number == 0 else [])):
            listed.append(_variant(chosen, full, even))
    return listed


def _variant(chosen: Tile, full: bool, even: bool) -> Variant:
    sizes = {name: value for name, value in chosen.items() if name.isupper()}
    optional = dict.fromkeys(("xa1_ptr", "b1_ptr", "xa3_ptr", "b3_ptr"), "*bf16")
    signature = {"x_ptr": "*i8", "x_scale_ptr": "*fp32", "w1_ptr": "*i8", "w1_scale_ptr": "*fp32"}
    signature |= {"w3_ptr": "*i8", "w3_scale_ptr": "*fp32", "y_ptr": "*bf16"}
    signature |= dict.fromkeys(("rows", "outputs", "columns", "rank1", "rank3"), "i32") | {"factor": "fp32"}
    shape = "x".join(str(sizes[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    return Variant(
        name=f"swiglu_int8 {shape}{' low-rank' if full else ''}{'' if even else ' ragged K'}",
        kernel=_swiglu_int8_kernel,
        signature=signature | (optional if full else {}),
        constexprs={**sizes, "EVEN_K": even, **({} if full else dict.fromkeys(optional))},
        aligned=tuple(name for name in signature | (optional if full else {}) if name not in ("rows", "factor")),
        num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"],
        matrix=("s8", "bf16") if full else ("s8",),
    )
