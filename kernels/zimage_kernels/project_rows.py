"""x A^T from the 8-bit codes of x: the narrow product that a LoRA adds to a linear, before B.

The codes are read once and widened in registers, so that no 16-bit copy of x is ever written: at 1024x1024 that would
be 33 MB for every linear of a block, twice what the codes take.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import OPTIONS, Backend, cdiv, has_matrix_units, jit, tl, use_triton
from .aot import Variant

_WIDEST = 64  # ranks of one program; more re-read x, from L2
_LAUNCH = {"num_warps": 4, "num_stages": 3}


def project_rows(x: Tensor, x_scale: Tensor, a: Tensor, backend: Backend = "auto") -> Tensor:
    """(x * x_scale) A^T, summed in float32.

    x: [M, K] int8; x_scale: [M] float32; a: [r, K] float16, bfloat16 or (reference only) float32; all contiguous.
    Returns [M, r] in a's dtype. A is rotated as x is.
    """
    (rows, columns), rank = x.shape, len(a)
    if a.shape[1:] != x.shape[1:] or x_scale.shape != x.shape[:1]:
        raise ValueError(f"a: got {list(a.shape)} for x of {list(x.shape)}, expected [r, {columns}]")
    if not use_triton(backend, x.device) or not has_matrix_units(x.device):
        return project_rows_reference(x, x_scale, a)
    y = torch.empty(rows, rank, dtype=a.dtype, device=x.device)
    tile = _tile(rank)
    grid = (cdiv(rows, tile["BLOCK_M"]), cdiv(rank, tile["BLOCK_R"]))
    _project_kernel[grid](x, x_scale, a, y, rows, columns, rank, **tile, **_LAUNCH, **OPTIONS)
    return y


def project_rows_reference(x: Tensor, x_scale: Tensor, a: Tensor) -> Tensor:
    """The definition of `project_rows`, in torch."""
    wide = a.dtype if x.device.type == "cuda" else torch.float32
    return ((x.to(wide) @ a.to(wide).T).float() * x_scale[:, None]).to(a.dtype)


def _tile(rank: int) -> dict[str, int]:
    """32 rows high: 132 programs at 1024x1024, where a laptop has 30 multiprocessors. A stage takes 12 KiB at most."""
    block = next(block for block in (16, 32, _WIDEST) if rank <= block or block == _WIDEST)
    return {"BLOCK_R": block, "BLOCK_M": 32, "BLOCK_K": 64 if block == _WIDEST else 128}


@jit
def _project_kernel(
    x_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    a_ptr: tl.tensor,
    y_ptr: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    ranks: tl.tensor,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    m_read, r_read = tl.minimum(m, rows - 1), tl.minimum(r, ranks - 1)  # so that loads need no mask of rows
    x_ptrs = x_ptr + m_read[:, None] * columns + k[None, :]
    a_ptrs = a_ptr + r_read[None, :] * columns + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, columns, BLOCK_K):
        left = columns - start
        x = tl.load(x_ptrs, mask=k[None, :] < left, other=0)
        a = tl.load(a_ptrs, mask=k[:, None] < left, other=0.0)
        acc = tl.dot(x.to(a.dtype), a, acc)
        x_ptrs += BLOCK_K
        a_ptrs += BLOCK_K
    y = acc * tl.load(x_scale_ptr + m_read)[:, None]
    inside = (m[:, None] < rows) & (r[None, :] < ranks)
    tl.store(y_ptr + m[:, None] * ranks + r[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


def variants(arch: int) -> list[Variant]:
    """Each width in both 16-bit types; none where Triton has no matrix units."""
    if arch < 80:
        return []
    return [_variant(dtype, block) for dtype in ("bf16", "fp16") for block in (16, 32, _WIDEST)]


def _variant(dtype: str, block: int) -> Variant:
    signature = {"x_ptr": "*i8", "x_scale_ptr": "*fp32", "a_ptr": f"*{dtype}", "y_ptr": f"*{dtype}"}
    signature |= {"rows": "i32", "columns": "i32", "ranks": "i32"}
    return Variant(
        name=f"project_rows {dtype} rank {block}",
        kernel=_project_kernel,
        signature=signature,
        constexprs=_tile(block),
        aligned=("x_ptr", "x_scale_ptr", "a_ptr", "y_ptr", "columns"),
        num_warps=_LAUNCH["num_warps"],
        num_stages=_LAUNCH["num_stages"],
        matrix=(dtype.replace("fp", "f"),),
    )
