"""What a weight in any format does to a gradient: the product with its transpose, unpacked."""

from __future__ import annotations

import pytest
import torch
from marking import always
from oracles import relative_error
from packing import packed_as

from zimage_lite.quant import tensor
from zimage_lite.quant.formats import FORMATS

WRITABLE = [name for name, row in FORMATS.items() if row.writable]
ONE_OF_EACH = ("f32", "q8_0", "q4_k", "int8", "int4", "fp8", "nf4", "qint4")


@pytest.mark.parametrize("name", always(*ONE_OF_EACH, of=WRITABLE))
def test_a_gradient_is_that_of_the_unpacked_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also unpacked in pieces, whose parts of the sum are added up. float32: 1e-6 is some ten roundings."""
    monkeypatch.setattr(tensor, "CPU_PIECE_WEIGHTS", 2**14)
    weight = packed_as(name, torch.randn(160, 256))
    x, dy = torch.randn(5, 256, requires_grad=True), torch.randn(5, 160)
    weight.linear(x).backward(dy)
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert relative_error(x.grad, dy.double() @ weight.dequantize().double()) <= 1e-6


@pytest.mark.parametrize("name", ["bf16", "int8", "q4_k"])
def test_in_bf16_it_is_rounded_once_or_a_few_times(name: str) -> None:
    """A rounding is 2^-9 at most; int8 rounds the scaled gradient and before and after its rotation."""
    weight = packed_as(name, torch.randn(160, 256))
    x, dy = torch.randn(5, 256).bfloat16().requires_grad_(), torch.randn(5, 160).bfloat16()
    weight.linear(x).backward(dy)
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert relative_error(x.grad, dy.double() @ weight.dequantize().double()) <= 4 * 2**-9


def test_without_a_gradient_nothing_is_kept() -> None:
    weight = packed_as("int8", torch.randn(32, 64))
    assert weight.linear(torch.randn(3, 64)).grad_fn is None
    with torch.inference_mode():
        assert not weight.linear(torch.randn(3, 64)).requires_grad
