"""y = x W^T from 8-bit codes: exact 32-bit sums on the matrix units, one scale per row of x and of W.

int8 is 4 times as fast as 16-bit with 32-bit accumulation on every laptop GPU since Turing. Everything that follows
the product happens in float32 registers: scales, low-rank terms, bias, and a power-of-two factor that keeps float16
outputs in range (what follows `out` and `w2` is an RMSNorm, which does not see it).
W is [N, K] with K contiguous, because the matrix units have no transposed load for 8 bits.

The loop over K holds DOTS products, two on purpose before 9.0. With one, Triton's prefetch pass (8.0 to 8.9 only)
carries the next operands through the loop as single bytes, one register each: on 8.6 a tile of 128x128x64 then takes
245 registers and 336 PRMT for 32 IMMA, with two 143 and none. The pass leaves loops with more than one product alone.
On 9.0 each product waits for its `wgmma`, so that two would only wait twice and take the room of a second block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import HALF_RATE_SUMS, OPTIONS, Backend, cdiv, has_matrix_units, jit, tl, use_triton
from .aot import Variant
from .integer_product import scaled_product
from .tuning import Tile, tile, tiles
from .unfused_int8 import LowRank, unfused_int8

RANK_STEP = 16  # of the low-rank loop: one 16-bit matrix instruction deep


def linear_int8(
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    low_rank: LowRank | None = None,
    scale_log2: int = 0,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: Backend = "auto",
) -> Tensor:
    """((x * x_scale) (w * w_scale)^T + xA B^T + bias) * 2^scale_log2.

    x: [M, K] int8; x_scale: [M] float32; w: [N, K] int8; w_scale: [N] float32; bias: [N], any float dtype.
    low_rank: (xA [M, r], B [N, r]), float16 or bfloat16 both (float32 for the reference); several LoRAs lie side by
    side in r.
    K is a multiple of 16, any M and N. Returns [M, N] in out_dtype: bfloat16, float16 or float32. On compute capability
    7.5 torch multiplies, and a kernel does the rest.
    """
    rows, columns, outputs = check_operands(x, x_scale, w, w_scale, low_rank)
    kernels = use_triton(backend, x.device)
    fused = kernels and has_matrix_units(x.device)
    if kernels and not fused:
        return unfused_int8(x, x_scale, (w, w_scale), None, bias, scale_log2, out_dtype, low_rank)
    if not fused:
        return linear_int8_reference(x, x_scale, w, w_scale, bias, low_rank, scale_log2, out_dtype)
    y = torch.empty(rows, outputs, dtype=out_dtype, device=x.device)
    xa, b, rank = rank_operands(low_rank)
    chosen = tile("linear_int8", rows, x.device)
    even = columns % (2 * chosen["BLOCK_K"]) == 0
    grid = (cdiv(rows, chosen["BLOCK_M"]) * cdiv(outputs, chosen["BLOCK_N"]),)
    _linear_int8_kernel[grid](
        x, x_scale, w, w_scale, bias, xa, b, y, rows, outputs, columns, rank, 2.0**scale_log2, even, **chosen, **OPTIONS
    )
    return y


def linear_int8_reference(
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    low_rank: LowRank | None = None,
    scale_log2: int = 0,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The definition of `linear_int8`, in torch."""
    y = scaled_product(x, x_scale, w, w_scale)
    if low_rank is not None:
        y.addmm_(low_rank[0].float(), low_rank[1].float().T)  # in place: page faults of another sum took longer than it
    if bias is not None:
        y += bias.float()
    return y.mul_(2.0**scale_log2).to(out_dtype)


def check_operands(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, low_rank: LowRank | None
) -> tuple[int, int, int]:
    """(M, K, N), or ValueError."""
    for name, codes, scale in (("x", x, x_scale), ("w", w, w_scale)):
        if codes.dtype != torch.int8 or codes.ndim != 2 or not codes.is_contiguous():
            raise ValueError(f"{name}: got {codes.dtype} {list(codes.shape)}, expected contiguous int8 [rows, K]")
        if scale.dtype != torch.float32 or scale.shape != codes.shape[:1] or not scale.is_contiguous():
            expected = f"contiguous float32 [{len(codes)}]"
            raise ValueError(f"{name}_scale: got {scale.dtype} {list(scale.shape)}, expected {expected}")
    (rows, columns), outputs = x.shape, len(w)
    if w.shape[1] != columns:
        raise ValueError(f"w: got K = {w.shape[1]}, expected {columns} as x has")
    if columns % 16:
        raise ValueError(f"K: got {columns}, expected a multiple of 16 (loads of 16 bytes)")
    if rows * max(columns, outputs) >= 2**31 or outputs * columns >= 2**31:
        raise ValueError(f"M, N, K: got {rows}, {outputs}, {columns}, expected fewer than 2^31 elements in each matrix")
    if low_rank is not None:
        xa, b = low_rank
        if not xa.dtype.is_floating_point or xa.dtype != b.dtype:
            raise ValueError(f"low_rank: got {xa.dtype} and {b.dtype}, expected floats, both the same")
        if len(xa) != rows or len(b) != outputs or xa.shape[1:] != b.shape[1:]:
            raise ValueError(
                f"low_rank: got {list(xa.shape)} and {list(b.shape)}, expected [{rows}, r] and [{outputs}, r]"
            )
    return rows, columns, outputs


def rank_operands(low_rank: LowRank | None) -> tuple[Tensor | None, Tensor | None, int]:
    """(xA, B, r) as the kernels read them: contiguous, r filled up with zeros to a multiple of RANK_STEP."""
    if low_rank is None:
        return None, None, 0
    if low_rank[0].dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"low_rank: got {low_rank[0].dtype}, expected float16 or bfloat16 for the kernels")
    missing = -low_rank[0].shape[1] % RANK_STEP
    xa, b = ((F.pad(t, (0, missing)) if missing else t).contiguous() for t in low_rank)
    return xa, b, xa.shape[1]


@jit
def grouped_tile(
    rows: tl.tensor, outputs: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Row and column of this program's tile. Those that run together share GROUP_M strips of x and few of W in L2."""
    across = tl.cdiv(outputs, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * across)
    inside = tl.program_id(0) % (GROUP_M * across)
    height = tl.minimum(tl.cdiv(rows, BLOCK_M) - group * GROUP_M, GROUP_M)
    return group * GROUP_M + inside % height, inside // height


@jit
def dequantized(
    acc: tl.tensor,
    x_scale_ptr: tl.tensor,
    w_scale_ptr: tl.tensor,
    xa_ptr: tl.tensor,
    b_ptr: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    rank: tl.tensor,
) -> tl.tensor:
    """The int32 tile times its scales, plus the low-rank term, in float32. m, n: its rows and columns, all existing."""
    y = acc.to(tl.float32) * tl.load(x_scale_ptr + m)[:, None] * tl.load(w_scale_ptr + n)[None, :]
    if xa_ptr is not None:
        r = tl.arange(0, 16)
        for start in range(0, rank, 16):
            xa = tl.load(xa_ptr + m[:, None] * rank + start + r[None, :])
            b = tl.load(b_ptr + n[None, :] * rank + start + r[:, None])
            y = tl.dot(xa, b, y)
    return y


@jit
def _linear_int8_kernel(
    x_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    w_ptr: tl.tensor,
    w_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    xa_ptr: tl.tensor,
    b_ptr: tl.tensor,
    y_ptr: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    columns: tl.tensor,
    rank: tl.tensor,
    factor: tl.tensor,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    DOTS: tl.constexpr,
) -> None:
    tile_m, tile_n = grouped_tile(rows, outputs, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = (m[:, None] < rows) & (n[None, :] < outputs)
    m_read, n_read = tl.minimum(m, rows - 1), tl.minimum(n, outputs - 1)  # so that loads need no mask
    x_ptrs = x_ptr + m_read[:, None] * columns + k[None, :]
    w_ptrs = w_ptr + n_read[None, :] * columns + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for _start in range(0, columns, DOTS * BLOCK_K):
        for _ in tl.static_range(DOTS):
            if EVEN_K:
                x, w = tl.load(x_ptrs), tl.load(w_ptrs)
            else:
                x = tl.load(x_ptrs, mask=k[None, :] < columns, other=0)
                w = tl.load(w_ptrs, mask=k[:, None] < columns, other=0)
                k += BLOCK_K
            acc = tl.dot(x, w, acc, out_dtype=tl.int32)
            x_ptrs += BLOCK_K
            w_ptrs += BLOCK_K
    y = dequantized(acc, x_scale_ptr, w_scale_ptr, xa_ptr, b_ptr, m_read, n_read, rank)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n_read).to(tl.float32)[None, :]
    tl.store(y_ptr + m[:, None] * outputs + n[None, :], (y * factor).to(y_ptr.dtype.element_ty), mask=inside)


def variants(arch: int) -> list[Variant]:
    """Every tile plain and with low-rank terms, the first one also with a bias and with a ragged K, which small models
    have; for v in float16, too, where attention wants that."""
    listed = []
    for number, chosen in enumerate(tiles("linear_int8", arch)):
        listed += [_variant(chosen), _variant(chosen, ("xa_ptr", "b_ptr"))]
        if number == 0:
            listed += [_variant(chosen, ("bias_ptr", "xa_ptr", "b_ptr")), _variant(chosen, even=False)]
        if arch in HALF_RATE_SUMS:
            listed += [_variant(chosen, out="fp16"), _variant(chosen, ("xa_ptr", "b_ptr"), out="fp16")]
    return listed


def _variant(chosen: Tile, given: tuple[str, ...] = (), even: bool = True, out: str = "bf16") -> Variant:
    sizes = {name: value for name, value in chosen.items() if name.isupper()}
    absent = dict.fromkeys({"bias_ptr", "xa_ptr", "b_ptr"} - set(given))
    signature = {"x_ptr": "*i8", "x_scale_ptr": "*fp32", "w_ptr": "*i8", "w_scale_ptr": "*fp32", "y_ptr": f"*{out}"}
    signature |= {"rows": "i32", "outputs": "i32", "columns": "i32", "rank": "i32", "factor": "fp32"}
    signature |= dict.fromkeys(given, "*bf16")
    shape = "x".join(str(sizes[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    terms = (" low-rank" if "xa_ptr" in given else "") + (" bias" if "bias_ptr" in given else "")
    return Variant(
        name=f"linear_int8 {shape}{terms}{'' if even else ' ragged K'}{'' if out == 'bf16' else f' to {out}'}",
        kernel=_linear_int8_kernel,
        signature=signature,
        constexprs={**sizes, "EVEN_K": even, **absent},
        aligned=tuple(name for name in signature if name not in ("rows", "factor")),
        num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"],
        matrix=("s8", "bf16") if "xa_ptr" in given else ("s8",),
    )
