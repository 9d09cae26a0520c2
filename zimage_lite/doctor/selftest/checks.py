"""One small test of each kernel, in the shapes and dtypes that the model has, against its torch reference.

Sizes that make Triton compile something else are those of the model (dtype, row length, heads, every tile of the tuning
files, sizes divisible by 16 or not), so that what is compiled here is what runs later, and a picture in a usual format
compiles nothing more; all others are as small as they can be. A check takes what the model computes in, makes its data
on torch's default device, and returns None or what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import zimage_kernels as ops
from torch import Tensor
from zimage_kernels import Branch, Int8Rows, Norm
from zimage_kernels._triton import capability, interpreted
from zimage_kernels.tuning import load, nearest

from ...model.float16 import stream_dtype
from ...quant.bnb import read_state
from ...quant.formats import FORMATS
from .agreement import UNIT, first, rounded, same_rows, worst

GROUP = 256  # of the rotation, for all linears
EPS = 1e-5
KINDS = ("q8_0", "q4_k", "q5_k", "q6_k", "int4", "nf4", "qint4", "qint8")  # the usual; each layout that is not ggml's
RANKS = (0, 16)  # without and with a LoRA
USUAL = KINDS[:5]  # what most files are made of: also in the long rows of w2
Check = Callable[[torch.dtype], "str | None"]


def compute_dtype(device: torch.device) -> torch.dtype:
    """What the model computes in there. Triton's interpreter has no bfloat16 that can be trusted."""
    return torch.float16 if interpreted() or capability(device) < 80 else torch.bfloat16


def _activations(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian, with a few channels 30 times as large: what the rotation is for."""
    x = torch.randn(rows, columns)
    x[:, :: columns // 4] *= 30
    return x.to(dtype)


def _codes(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """With 512 columns of both, products are 0.1 to 40 in size: where SiLU bends, and float16 holds their squares."""
    codes = (40 * torch.randn(rows, columns)).round().clamp(-127, 127).char()
    return codes, torch.exp2(4 * torch.rand(rows) - 9)


def _vector(dim: int, dtype: torch.dtype) -> Tensor:
    return (1 + 0.3 * torch.randn(dim)).to(dtype)


def _bucket_rows(op: str) -> list[int]:
    """A number of rows for each tile of the tuning file, that no tile divides; one where torch multiplies."""
    buckets = load(nearest(capability(torch.empty(0).device))).get(op, [])
    bounds = [0, *(bucket["up_to"] for bucket in buckets[:-1])]
    return [bound + 1 if bound else 9 for bound in bounds]


# --- Products

# Of the model, where torch multiplies: rows as they come (a short prompt; a piece of w1 or w3; 1024x1024), N and K.
TORCH_PRODUCTS = ((32, 3840, 3840), (768, 10240, 3840), (4224, 3840, 3840), (4224, 3840, 10240))


def _linear_int8(dtype: torch.dtype) -> str | None:
    """In every tile without and with what a LoRA adds. K of the model is a multiple of every step; the ragged loop and
    a bias belong to small models."""

    def one(rows: int, columns: int, rank: int, out: torch.dtype = dtype, bias: bool = False) -> str | None:
        x, w = _codes(rows, columns), _codes(144, columns)
        low_rank = _low_rank(rows, rank, dtype)
        given = (*x, *w, torch.randn(144).to(dtype) if bias else None, low_rank, -1 if bias else 0)
        truth = ops.linear_int8_reference(*given, out_dtype=torch.float32)
        part = _rounded_before(low_rank)
        got = ops.linear_int8(*given, out_dtype=out, backend="triton")
        return rounded(f"{rows} rows, rank {rank}", got, truth, part=part)

    outputs = {dtype, torch.float16} if _attends_in_float16() else {dtype}
    cases = ((rows, 512, rank, out) for rows in _bucket_rows("linear_int8") for rank in RANKS for out in outputs)
    return first(one(*case) for case in cases) or one(9, 336, 16, bias=True) or _torch_products()


def _low_rank(rows: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    return (torch.randn(rows, rank).to(dtype), torch.randn(144, rank).to(dtype)) if rank else None


def _rounded_before(low_rank: tuple[Tensor, Tensor] | None) -> Tensor | None:
    """Low-rank terms, where torch multiplies: it rounds them before they are added."""
    if low_rank is None or ops.has_matrix_units(torch.empty(0).device):
        return None
    return low_rank[0].float() @ low_rank[1].float().T


def _attends_in_float16() -> bool:
    """Whether v, and what attention gives, are float16 whatever else is computed in."""
    return ops.adds_faster_in_float16(torch.empty(0).device)


def _torch_products() -> str | None:
    """cuBLAS has products for some sizes and not for others."""
    device = torch.empty(0).device
    for rows, outputs, columns in () if ops.has_matrix_units(device) else TORCH_PRODUCTS:
        x, w = (torch.ones(n, columns, dtype=torch.int8) for n in (rows, outputs))
        if not bool((ops.integer_product(x, w) == columns).all()):
            return f"torch's sums of {rows} x {outputs} x {columns}"
    return None


def _project_rows(dtype: torch.dtype) -> str | None:
    """One rank for each width of the kernel's tile, that does not fill it."""

    def one(rank: int) -> str | None:
        x, a = _codes(37, 512), torch.randn(rank, 512).to(dtype)
        exact = (x[0].double() * x[1].double()[:, None]) @ a.double().T
        return rounded(f"rank {rank}", ops.project_rows(*x, a, backend="triton"), exact)

    return first(one(rank) for rank in (9, 25, 49))


def _swiglu_int8(dtype: torch.dtype) -> str | None:
    def one(rows: int, rank: int) -> str | None:
        x, w1, w3 = _codes(rows, 512), _codes(144, 512), _codes(144, 512)
        low1, low3 = (_low_rank(rows, rank, dtype) for _ in range(2))
        given = (*x, *w1, *w3, low1, low3)
        truth = ops.swiglu_int8_reference(*given, out_dtype=torch.float32)
        gate, value = (
            ops.linear_int8_reference(*x, *w, low_rank=low, out_dtype=torch.float32)
            for w, low in ((w1, low1), (w3, low3))
        )
        part1, part3 = _rounded_before(low1), _rounded_before(low3)
        part = None
        if part1 is not None and part3 is not None:  # SiLU is at most 1.1 steep
            part = 1.1 * part1.abs() * value.abs() + F.silu(gate).abs() * part3.abs()
        got = ops.swiglu_int8(*given, out_dtype=dtype, backend="triton")
        return rounded(f"{rows} rows, rank {rank}", got, truth, part=part)

    return first(one(rows, rank) for rows in _bucket_rows("swiglu_int8") for rank in RANKS)


# --- Attention

LENGTHS = [70, 131]  # one that ends inside a tile of keys, one inside the second tile of queries


def _exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention by its formula in float64, and what it gives for |v|."""
    out, size = [], []
    for q_i, k_i, v_i in zip(*(t.double().transpose(0, 1).split(LENGTHS, 1) for t in (q, k, v)), strict=True):
        weights = torch.softmax(q_i @ k_i.mT / math.sqrt(q.shape[2]), -1)
        out.append(weights @ v_i)
        size.append(weights @ v_i.abs())
    return torch.cat(out, 1).transpose(0, 1), torch.cat(size, 1).transpose(0, 1)


def _attended(name: str, got: Tensor, exact: tuple[Tensor, Tensor], roundings: float) -> str | None:
    """Each weight is rounded to v's dtype, and the result is: one u of either size. Sums and logits are float32."""
    out, size = exact
    return worst(name, got, out, UNIT[got.dtype] * (out.abs() + roundings * size) + 1e-5 * size)


def _qkv(dtype: torch.dtype) -> list[Tensor]:
    qkv = torch.randn(sum(LENGTHS), 3, 2, 128)
    qkv[..., ::50] *= 4
    return list(qkv.to(dtype).unbind(1))


def _flash_attention(dtype: torch.dtype) -> str | None:
    q, k, v = _qkv(dtype)
    return _attended("16-bit", ops.flash_attention(q, k, v, LENGTHS, backend="triton"), _exact(q, k, v), 1)


def _attention_int8(dtype: torch.dtype) -> str | None:
    """float16 sums of 64 products add up to 8 roundings of their size, if those are independent, which they are."""

    def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = (x.float().abs().amax(-1) / 127).T.contiguous().T
        return (x / scale[..., None]).round().clamp(-127, 127).char(), scale

    def one(v: Tensor, sums: bool) -> str | None:
        y = ops.attention_int8(q, q_scale, k, k_scale, v, LENGTHS, sums, "triton")
        exact = _exact(q.double() * q_scale[..., None], k.double() * k_scale[..., None], v)
        return _attended("float16 sums" if sums else "float32 sums", y, exact, 9 if sums else 1)

    q, k, v = _qkv(dtype)
    (q, q_scale), (k, k_scale) = quantized(q), quantized(k)
    return one(v, False) or one(v.half(), True)


# --- Passes over rows


def _quantize_rows(dtype: torch.dtype) -> str | None:
    def one(columns: int, dtype: torch.dtype) -> str | None:
        x = _activations(5, columns, dtype)
        got, expected = (ops.quantize_rows(x, GROUP, backend) for backend in ("triton", "reference"))
        return same_rows(f"rows of {columns}", got, expected)

    mixed = torch.float16 if _attends_in_float16() else dtype
    return first(one(*rows) for rows in dict.fromkeys(((3840, dtype), (10240, dtype), (3840, mixed))))


def _add_norm(dtype: torch.dtype) -> str | None:
    """The three passes of a block, of those that know the time and of those that do not."""
    dim, stream = 3840, stream_dtype(dtype)
    x, y = _activations(5, dim, stream), _activations(5, dim, dtype)
    branch = Branch(y, _vector(dim, dtype), _vector(dim, dtype).tanh(), EPS)
    norm = Norm(_vector(dim, dtype), _vector(dim, dtype), EPS)

    def one(branch: Branch | None, norm: Norm | None) -> str | None:
        group = None if norm is None else GROUP
        got, expected = (ops.add_norm(x, branch, norm, group, backend) for backend in ("triton", "reference"))
        # A sum may be a whole step of the stream apart, 2 u, and the norm that is taken of it is rounded again.
        step = worst("sum", got.x, expected.x, 2 * torch.finfo(stream).eps * expected.x.double().abs() + 1e-5)
        if step or norm is None:
            return step
        half = ops.add_norm(x, branch, norm, None, "triton")
        truth = ops.add_norm_reference(x, branch, norm._replace(weight=norm.weight.float()))
        return same_rows("int8", got.h, expected.h) or rounded("16-bit", half.h, truth.h, 3)  # type: ignore[arg-type]

    timeless = branch._replace(gate=None), norm._replace(scale=None)
    return first(one(*given) for b, n in ((branch, norm), timeless) for given in ((None, n), (b, n), (b, None)))


def _norm_rope(dtype: torch.dtype) -> str | None:
    lengths, heads = [20, 29], 30
    qkv = torch.randn(sum(lengths), 3 * heads * 128).to(dtype)
    q, k = (part.unflatten(1, (heads, 128)) for part in qkv.chunk(3, dim=1)[:2])
    angles = 6 * torch.rand(sum(lengths), 64)
    given = (_vector(128, dtype), angles.cos(), angles.sin(), EPS)
    truth = ops.norm_rope_reference(q.float(), *given)
    problem = rounded("16-bit", ops.norm_rope(q, *given, backend="triton"), truth)  # type: ignore[arg-type]
    for name, x, centre in (("queries", q, None), ("keys", k, lengths)):
        got, expected = (ops.norm_rope(x, *given, 64, centre, backend) for backend in ("triton", "reference"))
        problem = problem or same_rows(name, got, expected)  # type: ignore[arg-type]
    return problem


# --- Weights


def _weights() -> list[tuple[str, int]]:
    """Kinds, and lengths of their rows."""
    return [(kind, 3840) for kind in KINDS] + [(kind, 10240) for kind in KINDS if kind in USUAL]


def _packed(kind: str, columns: int) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
    """Parts, options, and what the codec makes of them, which is the definition. On the CPU, where codecs run."""
    codec = FORMATS[kind].codec
    options = dict(codec.options(columns))
    if kind == "qint4" and interpreted():
        options["dtype"] = "F16"
    with torch.device("cpu"):
        parts = codec.quantize(0.02 * torch.randn(3, columns), options)
        if kind == "nf4":
            options |= read_state(bytes(parts[codec.state_part].tolist()), kind)  # type: ignore[attr-defined]
        truth = codec.dequantize(parts, columns, options)[:3]
    device = torch.empty(0).device
    return {name: part.to(device) for name, part in parts.items()}, options, truth.to(device)


def _dequantize(dtype: torch.dtype) -> str | None:
    def one(kind: str, columns: int) -> str | None:
        parts, options, truth = _packed(kind, columns)
        out = torch.empty(truth.shape, dtype=dtype)
        ops.dequantize(kind, parts, options, out)
        return rounded(kind, out, truth)

    return first(one(*weight) for weight in _weights())


def _requantize(dtype: torch.dtype) -> str | None:
    """int4 is rotated int8 already: its codes times its scales are the weight, to the 2^-20 of a sum of 256."""

    def one(kind: str, columns: int) -> str | None:
        parts, options, truth = _packed(kind, columns)
        out = Int8Rows.empty(3, columns, truth.device)
        ops.requantize(kind, parts, options, out, GROUP)
        if kind == "int4":
            back = ops.hadamard_rotate(out.codes * out.scale.unsqueeze(1), GROUP)
            return worst(kind, back, truth, (truth.abs().max() * 2.0**-20).double())
        return same_rows(kind, out, ops.quantize_rows_reference(truth, GROUP))

    return first(one(*weight) for weight in _weights())


# op -> its check, and the compute capability that its kernel needs
CHECKS: dict[str, tuple[Check, int]] = {
    "quantize_rows": (_quantize_rows, 75),
    "add_norm": (_add_norm, 75),
    "norm_rope": (_norm_rope, 75),
    "dequantize": (_dequantize, 75),
    "requantize": (_requantize, 75),
    "linear_int8": (_linear_int8, 75),
    "swiglu_int8": (_swiglu_int8, 75),
    "project_rows": (_project_rows, 80),
    "flash_attention": (_flash_attention, 80),
    "attention_int8": (_attention_int8, 80),
}
