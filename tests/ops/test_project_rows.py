"""The narrow product of 8-bit rows: exact sums, one rounding, every element written, whatever the shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from activations import DEVICE, poisoned  # noqa: F401
from torch import Tensor
from zimage_kernels import linear_int8, project_rows
from zimage_kernels.project_rows import _tile

pytest.importorskip("triton")

BACKENDS = ["triton", "reference"]
WAYS = [("reference", torch.bfloat16), ("reference", torch.float16), ("triton", torch.float16)]
if DEVICE == "cuda":  # the interpreter multiplies the bits of bfloat16 as if they were integers
    WAYS.append(("triton", torch.bfloat16))
EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}  # half a step, relative
RANKS = [4, 16, 32, 48, 200]  # below a tile, one, in one of the widest, in several
# M around tiles of 32; K that no step of 64 divides, and several of them.
SHAPES = [(1, 16), (17, 48), (64, 64), (65, 336), (130, 1296)]


def operands(rows: int, columns: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    codes = (30 * torch.randn(rows, columns)).round().clamp(-128, 127).char()
    codes[:, 0] = -128
    codes[0] = 127
    scale = torch.exp2(6 * torch.rand(rows) - 12)
    return codes, scale, (0.05 * torch.randn(rank, columns)).to(dtype)


def exact(codes: Tensor, scale: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The product in float64, and the sum of the absolute terms of each."""
    x = codes.double() * scale.double()[:, None]
    return x @ a.double().T, x.abs() @ a.double().abs().T


@pytest.mark.parametrize(("backend", "dtype"), WAYS)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_error_is_that_of_rounding(rows: int, columns: int, rank: int, dtype: torch.dtype, backend: Any) -> None:
    given = operands(rows, columns, rank, dtype)
    truth, size = exact(*given)
    y = project_rows(*given, backend)
    assert y.dtype == dtype and y.shape == (rows, rank)
    # Half a step of the result, the smallest of float16 among them; and of float32 for each of K sums, at random.
    allowed = EPSILON[dtype] * truth.abs() + 2.0**-25 + 4 * columns**0.5 * EPSILON[torch.float32] * size
    assert ((y.double() - truth).abs() <= allowed).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_integers_are_exact(backend: Any) -> None:
    """A picks columns, the last of them behind the last whole step; an eighth of a code is exact in float16."""
    codes, _, _ = operands(65, 336, 1, torch.float16)
    a = torch.zeros(48, 336, dtype=torch.float16)
    a[torch.arange(48), torch.arange(48) * 7] = 2.0**-3
    y = project_rows(codes, torch.ones(65), a, backend)
    assert torch.equal(y.double(), codes.double() @ a.double().T)


def test_float32_by_the_reference() -> None:
    given = operands(17, 336, 4, torch.float32)
    truth, size = exact(*given)
    y = project_rows(*given, "reference")
    assert y.dtype == torch.float32
    assert ((y.double() - truth).abs() <= 4 * 336**0.5 * EPSILON[torch.float32] * size).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", RANKS)
def test_linear_takes_what_comes_out(rank: int, backend: Any) -> None:
    """x A^T, then B, beside the 8-bit product: together x (W + B A)^T."""
    (codes, scale, a), (w, w_scale, _) = operands(17, 336, rank, torch.float16), operands(40, 336, 1, torch.float16)
    b = torch.randn(40, rank).half()
    y = linear_int8(
        codes, scale, w, w_scale, None, (project_rows(codes, scale, a, backend), b), 0, torch.float32, backend
    )
    x = codes.double() * scale.double()[:, None]
    product, change = x @ (w.double() * w_scale.double()[:, None]).T, x @ (b.double() @ a.double()).T
    # x A^T is rounded to float16, and multiplied by B.
    allowed = EPSILON[torch.float16] * (x @ a.double().T).abs() @ b.double().abs().T + 1e-4 * (1 + product.abs())
    assert ((y.double() - product - change).abs() <= allowed).all()
    assert change.norm() > 0.05 * product.norm()  # else nothing was looked at


def test_no_rows_and_widths_of_programs() -> None:
    codes, scale, a = operands(4, 64, 48, torch.float16)
    assert project_rows(codes[:0], scale[:0], a, "reference").shape == (0, 48)
    assert [_tile(rank)["BLOCK_R"] for rank in RANKS] == [16, 16, 32, 64, 64]


@pytest.mark.parametrize("a", [torch.zeros(4, 48), torch.zeros(4, 64, 1)])
def test_wrong_operands_are_refused(a: Tensor) -> None:
    codes, scale, _ = operands(4, 64, 4, torch.float16)
    with pytest.raises(ValueError, match=r"a: got .* for x of \[4, 64\], expected \[r, 64\]"):
        project_rows(codes, scale, a.half(), "reference")
