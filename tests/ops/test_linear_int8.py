"""The int8 products: exact sums, one rounding, every element written, whatever the shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from activations import DEVICE, poisoned  # noqa: F401
from torch import Tensor
from zimage_kernels import linear_int8, linear_int8_reference, swiglu_int8, swiglu_int8_reference

BACKENDS = ["triton", "reference"]
EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}  # half a step, relative
# M around each bucket of the tuning files; N that no tile divides; K that no step divides, and the model's smallest.
SHAPES = [(1, 40, 16), (17, 72, 48), (129, 130, 336), (16, 256, 2560), (1152, 136, 64)]

pytest.importorskip("triton")


def operand(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Codes that reach both ends, as outliers do, and scales over six powers of two."""
    codes = (30 * torch.randn(rows, columns)).round().clamp(-128, 127).char()
    codes[:, 0] = -128
    codes[0] = 127
    return codes.to(DEVICE), torch.exp2(6 * torch.rand(rows) - 12).to(DEVICE)


def low_rank_terms(rows: int, outputs: int, rank: int) -> tuple[Tensor, Tensor]:
    xa, b = torch.randn(rows, rank).half(), torch.randn(outputs, rank).half()
    return xa.to(DEVICE), b.to(DEVICE)


def exact(x: tuple[Tensor, Tensor], w: tuple[Tensor, Tensor], low_rank: Any = None) -> tuple[Tensor, Tensor]:
    """The result in float64, and the sum of the absolute terms that it is made of."""
    terms = [(x[0].double() * x[1].double()[:, None]) @ (w[0].double() * w[1].double()[:, None]).T]
    if low_rank is not None:
        terms.append(low_rank[0].double() @ low_rank[1].double().T)
    return sum(terms), sum(term.abs() for term in terms)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "outputs", "columns"), SHAPES)
def test_sums_are_exact(rows: int, outputs: int, columns: int, backend: Any) -> None:
    """With unit scales float32 holds every sum of these sizes: 128 * 127 * 1024 < 2^24."""
    columns = min(columns, 1024)
    (x, _), (w, _) = operand(rows, columns), operand(outputs, columns)
    y = linear_int8(
        x, torch.ones(rows, device=DEVICE), w, torch.ones(outputs, device=DEVICE), out_dtype=torch.float32,
        backend=backend,
    )  # fmt: skip
    assert torch.equal(y.double(), x.double() @ w.double().T)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.float32])  # the interpreter truncates to bfloat16
@pytest.mark.parametrize(("rows", "outputs", "columns"), SHAPES)
def test_error_is_that_of_rounding(rows: int, outputs: int, columns: int, out_dtype: torch.dtype, backend: Any) -> None:
    x, w = operand(rows, columns), operand(outputs, columns)
    truth, size = exact(x, w)
    y = linear_int8(*x, *w, out_dtype=out_dtype, backend=backend)
    assert y.dtype == out_dtype
    # Half a step of the output, and of float32 in: the sum, two products with scales, the factor.
    allowed = EPSILON[out_dtype] * truth.abs() + 5 * EPSILON[torch.float32] * size + 2.0**-25
    assert ((y.double() - truth).abs() <= allowed).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [4, 16, 40])
def test_optional_terms(rank: int, backend: Any) -> None:
    x, w = operand(17, 64), operand(40, 64)
    low_rank, bias = low_rank_terms(17, 40, rank), torch.randn(40).half().to(DEVICE)
    truth, size = exact(x, w, low_rank)
    truth, size = (truth + bias.double()) / 128, (size + bias.double().abs()) / 128
    y = linear_int8(*x, *w, bias, low_rank, scale_log2=-7, out_dtype=torch.float32, backend=backend)
    # The low-rank sum adds up to `rank` roundings of terms larger than itself.
    allowed = (5 + rank) * EPSILON[torch.float32] * size + 1e-5 / 128
    assert ((y.double() - truth).abs() <= allowed).all()


def test_scale_keeps_float16_in_range() -> None:
    x, w = operand(3, 256)[0], operand(8, 256)[0]
    scales = torch.full((3,), 2.0**-5, device=DEVICE), torch.ones(8, device=DEVICE)
    big = linear_int8(x, scales[0], w, scales[1], out_dtype=torch.float16, backend="triton")
    small = linear_int8(x, scales[0], w, scales[1], scale_log2=-7, out_dtype=torch.float16, backend="triton")
    assert big[0, 0].isinf()  # 256 * 127 * 127 / 32
    assert torch.equal(small, (x.double() @ w.double().T / 2**12).half())


@pytest.mark.slow
@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "outputs", "columns"), SHAPES)
def test_swiglu(rows: int, outputs: int, columns: int, out_dtype: torch.dtype, low_rank: bool) -> None:
    """At most twice the error of the same formula in float32 and out_dtype by torch, both against float64."""
    x, w1, w3 = operand(rows, columns), operand(outputs, columns), operand(outputs, columns)
    x = x[0], x[1] * 16
    terms = [low_rank_terms(rows, outputs, 16) if low_rank else None for _ in range(2)]
    gate, value = exact(x, w1, terms[0])[0], exact(x, w3, terms[1])[0]
    truth = torch.nn.functional.silu(gate) * value / 8
    given = (*x, *w1, *w3, *terms, -3, out_dtype)
    y, torchs = swiglu_int8(*given, backend="triton"), swiglu_int8_reference(*given)
    assert y.dtype == torchs.dtype == out_dtype
    finite = truth.abs() < 65000
    assert finite.sum() > 0.9 * finite.numel()
    error, allowed = ((t.double() - truth)[finite].norm() for t in (y, torchs))
    assert error <= 2 * allowed
    assert allowed <= 4 * EPSILON[out_dtype] * truth[finite].norm()


def test_no_rows() -> None:
    x, w = operand(1, 64), operand(40, 64)
    assert linear_int8(x[0][:0], x[1][:0], *w).shape == (0, 40)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"x": torch.zeros(2, 64)}, r"x: got torch.float32 \[2, 64\], expected contiguous int8"),
    "transposed": ({"w": torch.zeros(64, 8, dtype=torch.int8).T}, r"w: got .* expected contiguous int8"),
    "K": ({"w": torch.zeros(8, 32, dtype=torch.int8)}, "w: got K = 32, expected 64"),
    "K step": (
        {"x": torch.zeros(2, 24, dtype=torch.int8), "w": torch.zeros(8, 24, dtype=torch.int8)},
        "K: got 24, expected a multiple of 16",
    ),
    "scale": ({"w_scale": torch.ones(8, 1)}, r"w_scale: got torch.float32 \[8, 1\], expected contiguous float32 \[8\]"),
    "rank": ({"low_rank": (torch.zeros(2, 4).half(), torch.zeros(8, 3).half())}, "low_rank: got .* expected"),
    "backend": ({"backend": "cuda"}, "backend: got 'cuda', expected auto, triton or reference"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_operands_are_refused(name: str) -> None:
    changed, message = WRONG[name]
    right = {
        "x": torch.zeros(2, 64, dtype=torch.int8),
        "x_scale": torch.ones(2),
        "w": torch.zeros(8, 64, dtype=torch.int8),
        "w_scale": torch.ones(8),
    }
    assert linear_int8_reference(**right).shape == (2, 8)
    with pytest.raises(ValueError, match=message):
        linear_int8(**(right | changed))
