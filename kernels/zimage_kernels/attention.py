"""Full attention over several sequences that lie one after another in the same tensor.

Packing instead of padding: no mask is ever built, and sequences of different lengths cost what they are.

The kernel is flash attention (Dao, 2023): a program holds one tile of queries of one head, walks over the keys, and
keeps the softmax's running maximum and sum in float32, in base 2 with 1 / sqrt(head_dim) folded in. Only the last tile
of a sequence is masked: in every tile masks took more instructions than the matrix products did. With int8 queries and
keys the logits are exact integer sums times two scales, on matrix units 4 times as fast; the weights stay 16-bit, as in
SageAttention (Zhang et al., 2024).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import MATRIX_UNITS, OPTIONS, Backend, cdiv, jit, tl, use_triton
from .aot import Variant
from .tuning import Tile, tile, tiles

HEAD_DIM = 128
SOFTMAX_SCALE = math.log2(math.e) / math.sqrt(HEAD_DIM)


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, separately for each sequence. The definition, and torch's own kernels.

    q: [tokens, heads, head_dim]; k, v: [tokens, kv_heads, head_dim], any float dtype; heads a multiple of kv_heads.
    lengths: tokens of each sequence, sum(lengths) == tokens. Returns [tokens, heads, head_dim] in q's dtype.
    """
    out = []
    for q_i, k_i, v_i in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        q_i, k_i, v_i = (t.transpose(0, 1).unsqueeze(0) for t in (q_i, k_i, v_i))
        out_i = F.scaled_dot_product_attention(q_i, k_i, v_i, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        out.append(out_i.squeeze(0).transpose(0, 1))
    return torch.cat(out)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], backend: Backend = "auto") -> Tensor:
    """What `attention` computes, not causal, as one launch for all sequences.

    q, k, v: [tokens, heads, 128], float16 or bfloat16 all; heads dense, tokens any distance apart, such as the parts of
    a fused qkv. lengths: tokens of each sequence. Returns [tokens, heads, 128] in q's dtype, contiguous.
    """
    for name, part in (("q", q), ("k", k), ("v", v)):
        _check(name, part, q, (torch.float16, torch.bfloat16))
    _check_lengths(lengths, len(q))
    if not use_triton(backend, q.device, MATRIX_UNITS):
        return attention(q, k, v, lengths)
    return _launch("attention", q, None, k, None, v, lengths, False)


def attention_int8(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    lengths: list[int],
    float16_sums: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """softmax((q * q_scale) (k * k_scale)^T / sqrt(128)) v, not causal, as one launch for all sequences.

    q, k: [tokens, heads, 128] int8; q_scale, k_scale: [tokens, heads] float32, one per token and head, any strides, the
    same in both; tokens side by side are read fastest.
    Softmax does not see a vector that is taken from all keys of a sequence, so k may be shifted by its mean before.
    v: [tokens, heads, 128] float16 or bfloat16; heads dense and tokens any distance apart, in q, k and v.
    float16_sums: add up the products with v of one tile of keys in float16, which GeForce cards do at twice the rate;
    v must be float16, and no |v| over 65504 / 128, or sums overflow. Returns [tokens, heads, 128] in v's dtype.
    """
    _check("q", q, q, (torch.int8,))
    _check("k", k, q, (torch.int8,))
    _check("v", v, q, (torch.float16,) if float16_sums else (torch.float16, torch.bfloat16))
    _check_lengths(lengths, len(q))
    for name, scale in (("q_scale", q_scale), ("k_scale", k_scale)):
        if scale.dtype != torch.float32 or scale.shape != q.shape[:2]:
            raise ValueError(f"{name}: got {scale.dtype} {list(scale.shape)}, expected float32 {list(q.shape[:2])}")
    if q_scale.stride() != k_scale.stride():
        raise ValueError(f"k_scale: got strides {k_scale.stride()}, expected {q_scale.stride()} as q_scale has")
    if not use_triton(backend, q.device, MATRIX_UNITS):
        return attention_int8_reference(q, q_scale, k, k_scale, v, lengths)
    return _launch("attention_int8", q, q_scale, k, k_scale, v, lengths, float16_sums)


def attention_int8_reference(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, lengths: list[int]
) -> Tensor:
    """The definition of `attention_int8`: queries and keys times their scales, rounded to v's dtype."""
    q, k = ((codes * scale[..., None]).to(v.dtype) for codes, scale in ((q, q_scale), (k, k_scale)))
    return attention(q, k, v, lengths)


def _check_lengths(lengths: list[int], tokens: int) -> None:
    if sum(lengths) != tokens or min(lengths, default=1) < 0:
        raise ValueError(f"lengths: got {lengths}, expected tokens of each sequence, {tokens} in all")


def _check(name: str, part: Tensor, q: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if part.ndim != 3 or part.shape != q.shape or part.shape[2] != HEAD_DIM:
        raise ValueError(f"{name}: got {list(part.shape)}, expected [tokens, heads, {HEAD_DIM}], the same for q, k, v")
    if part.dtype not in dtypes or (part.is_floating_point() and q.is_floating_point() and part.dtype != q.dtype):
        raise ValueError(f"{name}: got {part.dtype}, expected {' or '.join(map(str, dtypes))}, as q where q is a float")
    if part.stride(2) != 1 or part.stride(1) != HEAD_DIM or part.stride(0) % 16:
        raise ValueError(f"{name}: got strides {part.stride()}, expected dense heads and tokens a multiple of 16 apart")


def _launch(
    op: str, q: Tensor, q_scale: Tensor | None, k: Tensor, k_scale: Tensor | None, v: Tensor, lengths: list[int],
    float16_sums: bool,
) -> Tensor:  # fmt: skip
    tokens, heads, _ = q.shape
    if tokens * max(q.stride(0), k.stride(0), v.stride(0)) >= 2**31:
        raise ValueError(f"q, k, v: got {tokens} tokens, expected offsets under 2^31")
    out = torch.empty(tokens, heads, HEAD_DIM, dtype=v.dtype, device=q.device)
    longest = max(lengths, default=0)
    chosen = tile(op, longest, q.device)
    grid = (cdiv(longest, chosen["BLOCK_M"]), heads * len(lengths))
    scale_strides = (0, 0) if q_scale is None else q_scale.stride()
    if longest:
        _attention_kernel[grid](
            q, q_scale, k, k_scale, v, out, _bounds(tuple(lengths), q.device), SOFTMAX_SCALE, heads,
            q.stride(0), k.stride(0), v.stride(0), *scale_strides, float16_sums, **chosen, **OPTIONS,
        )  # fmt: skip
    return out


@lru_cache(maxsize=16)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each sequence begins, and where the last one ends: [sequences + 1] int32."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


@jit
def _attend(
    q: tl.tensor,
    q_scale: tl.tensor,
    acc: tl.tensor,
    total: tl.tensor,
    peak: tl.tensor,
    k_ptrs: tl.tensor,
    k_scale_ptrs: tl.tensor,
    v_ptrs: tl.tensor,
    inside: tl.tensor | None,
    FLOAT16_SUMS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One tile of keys. peak: the greatest logit so far; total: the sum of 2^(logit - peak); acc: that times v.
    inside: which keys there are, None for all."""
    k = tl.load(k_ptrs) if inside is None else tl.load(k_ptrs, mask=inside[None, :], other=0)
    logits = tl.dot(q, k).to(tl.float32)
    if k_scale_ptrs is not None:
        k_scale = tl.load(k_scale_ptrs) if inside is None else tl.load(k_scale_ptrs, mask=inside, other=0)
        logits = logits * k_scale[None, :]
    if inside is not None:
        logits = tl.where(inside[None, :], logits, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logits, 1) * q_scale)
    shrink = tl.exp2(peak - new_peak)
    weights = tl.exp2(logits * q_scale[:, None] - new_peak[:, None])
    total = total * shrink + tl.sum(weights, 1)
    acc *= shrink[:, None]
    # Here, not above: registers hold it only from here on.
    v = tl.load(v_ptrs) if inside is None else tl.load(v_ptrs, mask=inside[:, None], other=0)
    if FLOAT16_SUMS:
        acc += tl.dot(weights.to(v.dtype), v, out_dtype=tl.float16)
    else:
        acc = tl.dot(weights.to(v.dtype), v, acc)
    return acc, total, new_peak


@jit
def _attention_kernel(
    q_ptr: tl.tensor, q_scale_ptr: tl.tensor, k_ptr: tl.tensor, k_scale_ptr: tl.tensor, v_ptr: tl.tensor, out_ptr:
    tl.tensor, bounds_ptr: tl.tensor, softmax_scale: tl.tensor, heads: tl.tensor, q_stride: tl.tensor, k_stride:
    tl.tensor, v_stride: tl.tensor, scale_step: tl.tensor, scale_stride: tl.tensor, FLOAT16_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    head = tl.program_id(1) % heads
    begin = tl.load(bounds_ptr + tl.program_id(1) // heads)
    end = tl.load(bounds_ptr + tl.program_id(1) // heads + 1)
    first = begin + tl.program_id(0) * BLOCK_M
    if first >= end:
        return
    m = first + tl.arange(0, BLOCK_M)
    m_read = tl.minimum(m, end - 1)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, 128)
    q = tl.load(q_ptr + head * 128 + m_read[:, None] * q_stride + d[None, :])
    k_ptr += begin * k_stride + head * 128
    v_ptr += begin * v_stride + head * 128
    k_tile = n[None, :] * k_stride + d[:, None]  # offsets in 32 bits: fewer registers than as many pointers
    v_tile = n[:, None] * v_stride + d[None, :]
    if q_scale_ptr is None:
        q_scale = tl.full((BLOCK_M,), softmax_scale, tl.float32)
    else:
        q_scale = tl.load(q_scale_ptr + head * scale_stride + m_read * scale_step)
        q_scale = tl.maximum(q_scale, 1e-30) * softmax_scale  # -inf times 0 is NaN
        k_scale_ptr += begin * scale_step + head * scale_stride
    acc = tl.zeros((BLOCK_M, 128), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    whole = (end - begin) // BLOCK_N * BLOCK_N
    for _ in range(0, whole, BLOCK_N):
        k_scale_ptrs = None if k_scale_ptr is None else k_scale_ptr + n * scale_step
        acc, total, peak = _attend(
            q, q_scale, acc, total, peak, k_ptr + k_tile, k_scale_ptrs, v_ptr + v_tile, None, FLOAT16_SUMS
        )
        k_ptr += BLOCK_N * k_stride
        v_ptr += BLOCK_N * v_stride
        if k_scale_ptr is not None:
            k_scale_ptr += BLOCK_N * scale_step
    if begin + whole < end:
        k_scale_ptrs = None if k_scale_ptr is None else k_scale_ptr + n * scale_step
        inside = begin + whole + n < end
        acc, total, peak = _attend(
            q, q_scale, acc, total, peak, k_ptr + k_tile, k_scale_ptrs, v_ptr + v_tile, inside, FLOAT16_SUMS
        )
    out = acc / total[:, None]
    out_ptrs = out_ptr + head * 128 + m[:, None] * (heads * 128) + d[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=m[:, None] < end)


def variants(arch: int) -> list[Variant]:
    """Both ops in float16 and bfloat16, and int8 with float16 sums."""
    listed = [
        _variant(chosen, dtype, op == "attention_int8", False)
        for op in ("attention", "attention_int8")
        for chosen in tiles(op, arch)
        for dtype in ("fp16", "bf16")
    ]
    return listed + [_variant(chosen, "fp16", True, True) for chosen in tiles("attention_int8", arch)]


def _variant(chosen: Tile, dtype: str, int8: bool, float16_sums: bool) -> Variant:
    codes = "*i8" if int8 else f"*{dtype}"
    pointers = {"q_ptr": codes, "k_ptr": codes, "v_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "bounds_ptr": "*i32"}
    constexprs: dict[str, Any] = {name: value for name, value in chosen.items() if name.isupper()}
    if int8:  # as `norm_rope` writes them: the tokens of a head side by side
        pointers |= {"q_scale_ptr": "*fp32", "k_scale_ptr": "*fp32"}
        constexprs |= {"scale_step": 1}
    else:
        constexprs |= {"q_scale_ptr": None, "k_scale_ptr": None}
    strides = dict.fromkeys(("q_stride", "k_stride", "v_stride", *(() if int8 else ("scale_step",))), "i32")
    operand = dtype.replace("fp", "f")
    tile_name = f"{chosen['BLOCK_M']}x{chosen['BLOCK_N']}{' fp16 sums' if float16_sums else ''}"
    return Variant(
        name=f"attention{'_int8' if int8 else ''} {dtype} {tile_name}",
        kernel=_attention_kernel,
        signature={**pointers, **strides, "scale_stride": "i32", "heads": "i32", "softmax_scale": "fp32"},
        constexprs={**constexprs, "FLOAT16_SUMS": float16_sums},
        aligned=(*pointers, *strides),
        num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"],
        matrix=("s8", operand) if int8 else (operand,),
    )
