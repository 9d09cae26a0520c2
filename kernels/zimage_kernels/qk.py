"""Queries and keys, from the projection to what attention multiplies: RMSNorm of each head, RoPE, and 8 bits.

Keys may be shifted first: softmax does not see what is added to all logits of a query, so any vector may be taken from
all keys of a sequence and head, and near their mean it takes away what makes the range of the codes large.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._triton import OPTIONS, Backend, cdiv, jit, tl, use_triton
from .aot import Variant
from .norm import rms_norm
from .quantize import Int8Rows, check_group, quantize_rows_reference
from .rope import apply_rope
from .rotation import rotate_in_registers

# The mean of this many keys, evenly spaced, is within 1/16 of a standard deviation of the mean of all, and reads 6 %
# of the keys at 4224 tokens.
SAMPLES = 256
TILE = {"TOKENS": 16, "num_warps": 4, "num_stages": 2}
SPLITS = 3  # programs that share the heads of some tokens: cosines and sines are read 3 times and not 30


def norm_rope_reference(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    group: int | None = None, centre: list[int] | None = None,
) -> Tensor | Int8Rows:  # fmt: skip
    wide = apply_rope(rms_norm(x, weight.float(), eps), cos, sin)
    if centre is not None:
        wide = torch.cat([keys - keys[:: sample_step(len(keys))].mean(0) for keys in wide.split(centre)])
    return wide.to(x.dtype) if group is None else quantize_rows_reference(wide, group)


def norm_rope(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    group: int | None = None, centre: list[int] | None = None, backend: Backend = "auto",
) -> Tensor | Int8Rows:  # fmt: skip
    """RMSNorm of each head times weight, then the rotation of adjacent pairs by each token's angles, in float32.

    x: [tokens, heads, head_dim], heads dense, tokens any distance apart, such as a view of the fused qkv; head_dim a
    power of two. weight: [head_dim]; cos, sin: [tokens, head_dim / 2] float32. group: None writes x's dtype; else
    heads are rotated by groups of so many (0: not) and quantized, with a scale for each token and head. centre: lengths
    of the sequences, whose (sampled) means are subtracted; for keys. Returns [tokens, heads, head_dim], dense, or codes
    of that shape and scales [tokens, heads], in which the tokens of a head lie side by side: attention reads them so.
    """
    if group is not None:
        check_group(x.shape[2], group)
    if not use_triton(backend, x.device):
        return norm_rope_reference(x, weight, cos, sin, eps, group, centre)
    if x.stride()[1:] != (x.shape[2], 1) or not (cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError(f"norm_rope: got strides {x.stride()}, expected dense heads, and contiguous cos and sin")
    if centre is not None and sum(centre) != len(x):
        raise ValueError(f"norm_rope: got {sum(centre)} tokens in the sequences, expected {len(x)}")
    codes = torch.empty(x.shape, dtype=x.dtype if group is None else torch.int8, device=x.device)
    scale = None if group is None else torch.empty(x.shape[1::-1], dtype=torch.float32, device=x.device).T
    splits = math.gcd(x.shape[1], SPLITS)
    at = 0
    for length in centre or [len(x)]:
        part = slice(at, at + length)
        at += length
        angles = cos[part], sin[part]
        shift = _sampled_mean(x[part], weight, *angles, eps) if centre is not None else None
        _norm_rope_kernel[(cdiv(length, TILE["TOKENS"]), splits)](
            x[part], weight, *angles, shift, codes[part], None if scale is None else scale[part],
            length, x.stride(0), len(x), eps, group, x.shape[1], splits, x.shape[2], **TILE, **OPTIONS,
        )  # fmt: skip
    return codes if scale is None else Int8Rows(codes, scale)


def sample_step(length: int) -> int:
    """Every how many tokens a key is sampled: SAMPLES of them, or fewer than twice as many."""
    return max(length // SAMPLES, 1)


def _sampled_mean(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """[heads, head_dim] float32: the mean of the sampled keys of one sequence, normalised and rotated."""
    length, heads, head_dim = x.shape
    mean = torch.empty(heads, head_dim, dtype=torch.float32, device=x.device)
    _mean_kernel[(heads,)](
        x, weight, cos, sin, mean, length, x.stride(0), eps, head_dim, 32, SAMPLES, num_warps=8, **OPTIONS
    )
    return mean


@jit
def _norm_rope_kernel(
    x_ptr: tl.tensor, weight_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, shift_ptr: tl.tensor,
    out_ptr: tl.tensor, scale_ptr: tl.tensor,
    rows: tl.tensor, stride: tl.tensor, scale_stride: tl.tensor, eps: tl.float32,
    GROUP: tl.constexpr, HEADS: tl.constexpr, SPLITS: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr,
) -> None:  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = (token < rows)[:, None]
    channel = tl.arange(0, DIM)
    weight = tl.load(weight_ptr + channel).to(tl.float32)[None, :]
    cos, sin = _angles(cos_ptr, sin_ptr, token, inside, DIM)
    for first in range(0, HEADS, SPLITS):
        head = first + tl.program_id(1)
        x = tl.load(x_ptr + token[:, None] * stride + (head * DIM + channel)[None, :], mask=inside, other=0.0)
        x = _norm_rope(x, weight, cos, sin, eps, TOKENS, DIM)
        if shift_ptr is not None:
            x -= tl.load(shift_ptr + head * DIM + channel)[None, :]
        out_ptrs = out_ptr + (token * HEADS + head)[:, None] * DIM + channel[None, :]
        if scale_ptr is None:
            tl.store(out_ptrs, x.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            if GROUP:
                x = tl.reshape(rotate_in_registers(tl.reshape(x, (TOKENS * DIM,)), TOKENS * DIM, GROUP), (TOKENS, DIM))
            scale = tl.maximum(tl.max(tl.abs(x), 1) / 127, 1e-30)
            codes = (x * (1 / scale)[:, None] + 12582912.0) - 12582912.0  # rounds as in quantize.to_int8
            codes = tl.minimum(tl.maximum(codes, -127.0), 127.0).to(tl.int8)
            tl.store(out_ptrs, codes, mask=inside)
            tl.store(scale_ptr + head * scale_stride + token, scale, mask=token < rows)


@jit
def _mean_kernel(
    x_ptr: tl.tensor, weight_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, mean_ptr: tl.tensor,
    rows: tl.tensor, stride: tl.tensor, eps: tl.float32,
    DIM: tl.constexpr, TOKENS: tl.constexpr, SAMPLES: tl.constexpr,
) -> None:  # fmt: skip
    head = tl.program_id(0)
    channel = tl.arange(0, DIM)
    weight = tl.load(weight_ptr + channel).to(tl.float32)[None, :]
    total = tl.zeros((TOKENS, DIM), tl.float32)
    step = tl.maximum(rows // SAMPLES, 1)
    for first in range(0, 2 * SAMPLES, TOKENS):
        token = (first + tl.arange(0, TOKENS)).to(tl.int64) * step
        inside = (token < rows)[:, None]
        cos, sin = _angles(cos_ptr, sin_ptr, token, inside, DIM)
        x = tl.load(x_ptr + token[:, None] * stride + (head * DIM + channel)[None, :], mask=inside, other=0.0)
        total += _norm_rope(x, weight, cos, sin, eps, TOKENS, DIM)
    mean = tl.sum(total, 0) / ((rows + step - 1) // step)
    tl.store(mean_ptr + head * DIM + channel, mean)


@jit
def _angles(
    cos_ptr: tl.tensor, sin_ptr: tl.tensor, token: tl.tensor, inside: tl.tensor, DIM: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    at = token[:, None] * (DIM // 2) + tl.arange(0, DIM // 2)[None, :]
    return tl.load(cos_ptr + at, mask=inside, other=0.0), tl.load(sin_ptr + at, mask=inside, other=0.0)


@jit
def _norm_rope(
    x: tl.tensor, weight: tl.tensor, cos: tl.tensor, sin: tl.tensor, eps: tl.tensor,
    TOKENS: tl.constexpr, DIM: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """x: [TOKENS, DIM], one head. Rows of zeros stay zero."""
    x = x.to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / DIM + eps) * weight
    a, b = tl.split(tl.reshape(x, (TOKENS, DIM // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (TOKENS, DIM))


def variants(arch: int) -> list[Variant]:
    """Queries and keys, from float16 and bfloat16."""
    dtypes = ("fp16",) if arch < 80 else ("fp16", "bf16")
    quantized = [(group, centre) for group in (0, 64) for centre in (False, True)]
    rows = [_variant(dtype, group, centre) for dtype in dtypes for group, centre in [(None, False), *quantized]]
    return rows + [_mean_variant(dtype) for dtype in dtypes]


def _variant(dtype: str, group: int | None, centre: bool) -> Variant:
    pointers = {"x_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    pointers |= {"shift_ptr": "*fp32"} if centre else {}
    pointers |= {"out_ptr": f"*{dtype}"} if group is None else {"out_ptr": "*i8", "scale_ptr": "*fp32"}
    absent = dict.fromkeys({"shift_ptr", "scale_ptr"} - set(pointers))
    kind = "16-bit" if group is None else f"int8 {group}"
    return Variant(
        name=f"qk {dtype} {kind}{' centred' if centre else ''}",
        kernel=_norm_rope_kernel,
        signature={**pointers, "rows": "i32", "stride": "i32", "scale_stride": "i32", "eps": "fp32"},
        constexprs={**absent, "GROUP": group, "HEADS": 30, "SPLITS": SPLITS, "DIM": 128, "TOKENS": TILE["TOKENS"]},
        aligned=(*pointers, "stride"),
        num_warps=TILE["num_warps"],
        num_stages=TILE["num_stages"],
    )


def _mean_variant(dtype: str) -> Variant:
    pointers = {"x_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    return Variant(
        name=f"qk mean {dtype}",
        kernel=_mean_kernel,
        signature={**pointers, "mean_ptr": "*fp32", "rows": "i32", "stride": "i32", "eps": "fp32"},
        constexprs={"DIM": 128, "TOKENS": 32, "SAMPLES": SAMPLES},
        aligned=(*pointers, "mean_ptr", "stride"),
        num_warps=8,
    )
