"""RMSNorm, alone and as what ends one sub-block and begins the next, in one pass over memory.

    x <- x + gate * RMSNorm(y) * weight        y: what attention or the feed-forward made
    h  = RMSNorm(x) * weight * scale           the input of the next linears, in 16 bits or rotated int8

All arithmetic is in float32 whatever the dtypes; x is rounded to its own dtype before it is normalised, so that the
fused pass gives what two passes would.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import OPTIONS, Backend, jit, tl, use_triton
from .aot import Variant
from .quantize import Int8Rows, check_group, quantize_rows_reference, row_tile, to_int8


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich, 2019).

    x: [..., dim]; weight: [dim]. Returns x's shape in weight's dtype.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(weight.dtype) * weight


class Branch(NamedTuple):
    """What a sub-block adds to the residual stream: gate * RMSNorm(y) * weight.

    y: [rows, dim]; weight, gate: [dim], gate is tanh'ed already, None for 1. scale_log2: y is 2^scale_log2 times its
    true value, so that float16 holds it; the norm takes that out again, exactly.
    """

    y: Tensor
    weight: Tensor
    gate: Tensor | None
    eps: float
    scale_log2: int = 0


class Norm(NamedTuple):
    """RMSNorm(x) * weight * scale. weight, scale: [dim], scale is 1 + s already, None for 1."""

    weight: Tensor
    scale: Tensor | None
    eps: float


class Normed(NamedTuple):
    """x: the residual stream with the branch added, in its dtype; h: the norm of it, None if none was asked for."""

    x: Tensor
    h: Tensor | Int8Rows | None


def add_norm_reference(x: Tensor, branch: Branch | None, norm: Norm | None, group: int | None = None) -> Normed:
    if branch is not None:
        added = _normalise(branch.y.float(), _branch_eps(branch)) * branch.weight.float()
        gate = 1.0 if branch.gate is None else branch.gate.float()
        x = (x.float() + gate * added).to(x.dtype)
    if norm is None:
        return Normed(x, None)
    h = _normalise(x.float(), norm.eps) * norm.weight.float()
    if norm.scale is not None:
        h = h * norm.scale.float()
    return Normed(x, h.to(norm.weight.dtype) if group is None else quantize_rows_reference(h, group))


def add_norm(
    x: Tensor, branch: Branch | None, norm: Norm | None, group: int | None = None, backend: Backend = "auto"
) -> Normed:
    """The two lines at the top of this module; either may be left out.

    x: [rows, dim], float32 or 16-bit, contiguous like y. group: of the rotation before h is quantized (0: without
    rotation); None writes h in the dtype of norm.weight. x itself is not changed.
    """
    if group is not None:
        check_group(x.shape[1], group)
    if not use_triton(backend, x.device):
        return add_norm_reference(x, branch, norm, group)
    rows, dim = x.shape
    for name, given in (("x", x), ("y", branch.y if branch is not None else x)):
        if given.shape != x.shape or not given.is_contiguous():
            raise ValueError(f"{name}: got {list(given.shape)}, expected contiguous {list(x.shape)}")
    total = x if branch is None else torch.empty_like(x)
    h: Tensor | Int8Rows | None = None
    if norm is not None and group is not None:
        h = Int8Rows.empty(rows, dim, x.device)
    elif norm is not None:
        h = torch.empty(rows, dim, dtype=norm.weight.dtype, device=x.device)
    h_out, h_scale = h if isinstance(h, Int8Rows) else (h, None)
    y, branch_weight, gate, branch_eps = (
        (*branch[:3], _branch_eps(branch)) if branch is not None else (None, None, None, 0.0)
    )
    weight, scale, eps = norm or (None, None, 0.0)
    _add_norm_kernel[(rows,)](
        x, y, branch_weight, gate, total if branch is not None else None, weight, scale, h_out, h_scale,
        dim, branch_eps, eps, group, **row_tile(dim), **OPTIONS,
    )  # fmt: skip
    return Normed(total, h)


def _branch_eps(branch: Branch) -> float:
    """RMSNorm(2^k y) with 4^k eps is RMSNorm(y) with eps."""
    return branch.eps * 4.0**branch.scale_log2


def _normalise(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@jit
def _add_norm_kernel(
    x_ptr: tl.tensor, y_ptr: tl.tensor, branch_weight_ptr: tl.tensor, gate_ptr: tl.tensor, total_ptr: tl.tensor,
    weight_ptr: tl.tensor, scale_ptr: tl.tensor, h_ptr: tl.tensor, h_scale_ptr: tl.tensor,
    dim: tl.tensor, branch_eps: tl.float32, eps: tl.float32, GROUP: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < dim
    x = tl.load(x_ptr + row * dim + column, mask=inside, other=0.0).to(tl.float32)
    if y_ptr is not None:
        y = tl.load(y_ptr + row * dim + column, mask=inside, other=0.0).to(tl.float32)
        y = _normalised(y, branch_weight_ptr, gate_ptr, column, inside, dim, branch_eps)
        total = (x + y).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * dim + column, total, mask=inside)
        x = total.to(tl.float32)
    if weight_ptr is not None:
        h = _normalised(x, weight_ptr, scale_ptr, column, inside, dim, eps)
        if GROUP is None:
            tl.store(h_ptr + row * dim + column, h.to(h_ptr.dtype.element_ty), mask=inside)
        else:
            codes, scale = to_int8(h, BLOCK, GROUP)
            tl.store(h_ptr + row * dim + column, codes, mask=inside)
            tl.store(h_scale_ptr + row, scale)


@jit
def _normalised(
    x: tl.tensor, weight_ptr: tl.tensor, factor_ptr: tl.tensor, column: tl.tensor, inside: tl.tensor, dim: tl.tensor,
    eps: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """RMSNorm(x) * weight * factor. Every row reads the same weights, which stay in the cache."""
    x *= tl.rsqrt(tl.sum(x * x, 0) / dim + eps)
    x *= tl.load(weight_ptr + column, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if factor_ptr is not None:
        x *= tl.load(factor_ptr + column, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    return x


def variants(arch: int) -> list[Variant]:
    """One for each use in a block, of those that know the time and those that do not, in the dtypes of the
    architecture: 7.5 has no bfloat16, and a float32 stream."""
    dtypes = (("fp32", "fp16"), ("fp16", "fp16")) if arch < 80 else (("bf16", "bf16"), ("fp32", "fp16"))
    uses = (("norm", False, True), ("branch", True, False), ("branch + norm", True, True))
    found = product(uses, (True, False), dtypes, (None, 256))
    return [_variant(*use, timed, *stream, group) for use, timed, stream, group in found if use[2] or not group]


def _variant(name: str, branch: bool, norm: bool, timed: bool, stream: str, dtype: str, group: int | None) -> Variant:
    tile = row_tile(3840)
    pointers = {"x_ptr": f"*{stream}"}
    if branch:
        vectors = dict.fromkeys(("y_ptr", "branch_weight_ptr", *(("gate_ptr",) if timed else ())), f"*{dtype}")
        pointers |= vectors | {"total_ptr": f"*{stream}"}
    if norm:
        pointers |= dict.fromkeys(("weight_ptr", *(("scale_ptr",) if timed else ())), f"*{dtype}")
        pointers |= {"h_ptr": f"*{dtype}"} if group is None else {"h_ptr": "*i8", "h_scale_ptr": "*fp32"}
    absent = dict.fromkeys(set(_add_norm_kernel.jit_function.arg_names[:9]) - set(pointers))
    return Variant(
        name=f"add_norm {name}{'' if timed else ' timeless'} {stream} {dtype} {'16-bit' if group is None else 'int8'}",
        kernel=_add_norm_kernel,
        signature={**pointers, "dim": "i32", "branch_eps": "fp32", "eps": "fp32"},
        constexprs={**absent, "GROUP": group, "BLOCK": tile["BLOCK"]},
        aligned=(*pointers, "dim"),
        num_warps=tile["num_warps"],
    )
