"""8-bit products on compute capability 7.5: torch's, and one pass after them. In the interpreter, which is told that it
is a GPU of 7.5."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from activations import DEVICE, poisoned  # noqa: F401
from live_bytes import LiveBytes, NoLaunch
from marking import always
from torch import Tensor
from zimage_kernels import (
    has_matrix_units,
    integer_product,
    linear_int8,
    linear_int8_reference,
    swiglu_int8,
    swiglu_int8_reference,
)
from zimage_kernels._triton import interpreted

pytestmark = pytest.mark.slow  # products in Triton's interpreter

pytest.importorskip("triton")

SHAPES = [(1, 40, 16), (17, 1026, 48), (129, 136, 336), (300, 72, 64)]  # more outputs than a program has, and few
AS_KERNEL: dict[str, Any] = {"backend": "triton"}


@pytest.fixture(autouse=True)
def _turing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zimage_kernels._triton.capability", lambda device: 75)
    assert not has_matrix_units(torch.device(DEVICE))
    for op in ("linear_int8", "swiglu_int8"):
        monkeypatch.setattr(importlib.import_module(f"zimage_kernels.{op}"), f"_{op}_kernel", None)


def operand(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    codes = (40 * torch.randn(rows, columns)).round().clamp(-128, 127).char()
    return codes, torch.exp2(4 * torch.rand(rows) - 12)


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "outputs", "columns"), SHAPES)
def test_linear_is_the_reference(rows: int, outputs: int, columns: int, out_dtype: torch.dtype) -> None:
    """To the bit: the same roundings in the same order. But a GPU adds the bias before it rounds the product."""
    x, w, bias = operand(rows, columns), operand(outputs, columns), torch.randn(outputs).half()
    ours = linear_int8(*x, *w, out_dtype=out_dtype, backend="triton")
    assert torch.equal(ours, linear_int8_reference(*x, *w, out_dtype=out_dtype))
    given = (*x, *w, bias, None, -7)
    ours = linear_int8(*given, out_dtype=out_dtype, backend="triton")
    theirs = linear_int8_reference(*given, out_dtype=out_dtype)
    step, largest = (0, 0) if DEVICE == "cpu" else (torch.finfo(out_dtype).eps, theirs.abs().max().item())
    torch.testing.assert_close(ours, theirs, rtol=step, atol=2.0**-22 * largest)


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "outputs", "columns"), SHAPES)
def test_swiglu_is_the_reference(rows: int, outputs: int, columns: int, out_dtype: torch.dtype) -> None:
    """Their exponentials differ in the last bit or two of float32, so that some fall on the other side of a half."""
    given = (*operand(rows, columns), *operand(outputs, columns), *operand(outputs, columns), None, None, -7, out_dtype)
    ours, theirs = swiglu_int8(*given, backend="triton"), swiglu_int8_reference(*given)
    assert ours.dtype == theirs.dtype == out_dtype
    torch.testing.assert_close(ours, theirs, rtol=max(torch.finfo(out_dtype).eps, 2.0**-21), atol=2.0**-24)


def test_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three pieces, of which the last is short, give what one gives."""
    x, w1, w3 = operand(300, 64), operand(40, 64), operand(40, 64)
    given = (*x, *w1, *w3)
    whole = linear_int8(*x, *w1, backend="triton"), swiglu_int8(*given, backend="triton")
    seen = []

    def product(x: Tensor, w: Tensor) -> Tensor:
        seen.append(len(x))
        return integer_product(x, w)

    module = importlib.import_module("zimage_kernels.unfused_int8")
    monkeypatch.setattr(module, "integer_product", product)
    monkeypatch.setattr(module, "SUMS_BYTES", 4 * 40 * 150)
    pieces = linear_int8(*x, *w1, backend="triton"), swiglu_int8(*given, backend="triton")
    assert seen == [128, 128, 44, 128, 128, 128, 128, 44, 44]
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


@pytest.mark.skipif(not interpreted(), reason="kernels on meta tensors: needs TRITON_INTERPRET=1")
def test_the_sums_take_no_more_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """At full size, beside the result: 4224 tokens, where those of w1 and w3 would be 346 MB."""
    module = importlib.import_module("zimage_kernels.unfused_int8")
    monkeypatch.setattr(module, "_unfused_int8_kernel", NoLaunch())
    with torch.device("meta"):
        x = torch.empty(4224, 3840, dtype=torch.int8), torch.empty(4224)
        for outputs, call in ((3840, linear_int8), (10240, lambda *a, **k: swiglu_int8(*a[:2], *a[2:], *a[2:], **k))):
            weight = torch.empty(outputs, 3840, dtype=torch.int8), torch.empty(outputs)
            with LiveBytes() as live:
                y = call(*x, *weight, out_dtype=torch.float16, backend="triton")
            assert module.SUMS_BYTES / 2 < live.peak_bytes - y.nbytes <= module.SUMS_BYTES


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 97, 4224])
@pytest.mark.parametrize("outputs", [682, 3840])
def test_what_cuda_demands(rows: int, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 16 rows, and numbers that cuBLAS has a product for on 7.5; the result has the shape it should have."""
    given = []

    def multiply(x: Tensor, w: Tensor) -> Tensor:
        given.append((x, w))
        return torch.empty(len(x), w.shape[1], dtype=torch.int32, device="meta")

    monkeypatch.setattr(torch, "_int_mm", multiply)
    x, w = (torch.empty(n, 64, dtype=torch.int8, device="meta") for n in (rows, outputs))
    assert integer_product(x, w).shape == (rows, outputs)
    ((x_given, w_given),) = given
    assert x_given.shape[0] % 32 == w_given.shape[1] % 32 == 0 < x_given.shape[0]
    assert w_given.stride() == (1, 64)  # K-contiguous: cuBLAS takes no other layout for 8 bits
    assert (x_given is x) == (rows == 4224)


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "outputs", "columns"), always(*SHAPES[:3], of=SHAPES))
def test_low_rank_terms_are_rounded_once_more(
    rows: int, outputs: int, columns: int, out_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a step of float16 of the term, whose left factor is a 128th and may lose 2^-25, and a step of the result;
    SwiGLU multiplies the term's by the other factor. In three pieces where there are 300 rows."""
    module = importlib.import_module("zimage_kernels.unfused_int8")
    monkeypatch.setattr(module, "SUMS_BYTES", 12 * outputs * 150)
    x, w1, w3 = operand(rows, columns), operand(outputs, columns), operand(outputs, columns)
    low1, low3 = ((torch.randn(rows, 20).half(), torch.randn(outputs, 20).half()) for _ in range(2))
    given = (*x, *w1, torch.randn(outputs).half(), low1, -7)
    ours = linear_int8(*given, out_dtype=out_dtype, **AS_KERNEL)
    theirs = linear_int8_reference(*given, out_dtype=out_dtype)
    step, half = torch.finfo(out_dtype).eps, 2.0**-11
    term = (low1[0].double() @ low1[1].double().T).abs()
    allowed = 2.0**-7 * (half + 2.0**-20) * term + 2.0**-25 * (1 + low1[1].double().abs().sum(1))
    assert ((ours.double() - theirs.double()).abs() <= allowed + step * theirs.double().abs()).all()

    for lows in ((low1, low3), (None, low3), (low1, None)):
        ours = swiglu_int8(*x, *w1, *w3, *lows, out_dtype=out_dtype, **AS_KERNEL)
        theirs = swiglu_int8_reference(*x, *w1, *w3, *lows, out_dtype=out_dtype)
        sizes = []
        for w, low in ((w1, lows[0]), (w3, lows[1])):
            term = torch.zeros(rows, outputs) if low is None else (low[0].float() @ low[1].float().T).abs()
            sizes.append((linear_int8_reference(*x, *w, low_rank=low, out_dtype=torch.float32).abs(), term))
        (gate, term1), (value, term3) = sizes
        allowed = (half + 2.0**-20) * (1.1 * term1 * value + gate * term3) + 2 * step * theirs.float().abs() + 1e-4
        assert ((ours.float() - theirs.float()).abs() <= allowed).all()


def test_a_term_that_float16_does_not_hold() -> None:
    """But its share of the result does."""
    x, w = operand(17, 64), operand(40, 64)
    low_rank = torch.full((17, 16), 200.0).half(), torch.full((40, 16), 200.0).half()
    ours = linear_int8(*x, *w, low_rank=low_rank, scale_log2=-7, out_dtype=torch.float16, **AS_KERNEL)
    theirs = linear_int8_reference(*x, *w, low_rank=low_rank, scale_log2=-7, out_dtype=torch.float16)
    assert 16 * 200 * 200 > 65504 and ours.isfinite().all()
    torch.testing.assert_close(ours, theirs, rtol=2.0**-10, atol=0)


def test_rows_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA the sums of 40 outputs are the first of 64."""
    module = importlib.import_module("zimage_kernels.unfused_int8")
    x, w = operand(17, 64), operand(40, 64)

    def product(x: Tensor, w: Tensor) -> Tensor:
        return torch.nn.functional.pad(integer_product(x, w), (0, 24, 0, 15), value=7)[: len(x), : len(w)]

    expected = linear_int8(*x, *w, backend="triton")
    monkeypatch.setattr(module, "integer_product", product)
    assert torch.equal(linear_int8(*x, *w, backend="triton"), expected)
