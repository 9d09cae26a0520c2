"""Codecs of other programs' formats: what holds for all of them, and torchao's, by values that it gave."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from foreign_codecs import CODECS, ROTATED, as_bytes, close, weights
from oracles import relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchao_values import TORCHAO, W

from zimage_lite.quant import pieces
from zimage_lite.quant.formats import FORMATS
from zimage_lite.quant.tensor import TORCH_DTYPES, QTensor

READ_ONLY = ("mxfp8", "nvfp4", "convrot_w4a4", "torchao-int8", "torchao-fp8")
WRITTEN = tuple(name for name in CODECS if name not in READ_ONLY)


@pytest.mark.parametrize("case", list(TORCHAO))
def test_reads_torchao(case: str) -> None:
    name, group, data, scale, zero, expected = TORCHAO[case]
    dtype = torch.float8_e4m3fn if name == "torchao-fp8" else torch.int8
    parts = {
        "": torch.tensor(data, dtype=torch.int8).view(dtype).view(2, 8),
        "_scale": torch.tensor(scale).view(-1, 8 // group),
    }
    if zero is not None:
        parts["_zero_point"] = torch.tensor(zero, dtype=torch.int8).view(-1, 8 // group)
    wide = CODECS[name].dequantize(parts, 8, {"group": group})
    assert torch.equal(wide, torch.tensor(expected).view(2, 8))
    assert relative_error(wide, torch.tensor(W)) < 0.04


@pytest.mark.parametrize("name", WRITTEN)
def test_extreme_weights_stay_finite(name: str) -> None:
    codec = CODECS[name]
    options = codec.options(256)
    x = weights(128, 256)
    mixed = x.clone()
    mixed[:64] = 0
    cases: dict[str, tuple[Tensor, float]] = {
        "zero": (torch.zeros(128, 256), 0),
        "constant": (torch.full((128, 256), 0.3), 0.1),
        "zero rows": (mixed, 0.7),
        "tiny": (x * 1e-20, 0.7),
        "next to nothing": (x * 1e-38, 1e30),
        "huge": (x * 1e30, 0.7),
    }
    for case, (weight, tolerance) in cases.items():
        wide = codec.dequantize(codec.quantize(weight, options), 256, options)
        assert torch.isfinite(wide).all(), case
        assert (wide - weight).double().norm() <= tolerance * weight.double().norm(), case


@pytest.mark.parametrize("effort", ["fast", "reference", "best"])
@pytest.mark.parametrize("name", WRITTEN)
def test_pieces_make_no_difference(name: str, effort: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tensors are worked on a few rows at a time."""
    codec, x = CODECS[name], weights(37, 512)
    options = codec.options(512)
    whole = codec.quantize(x, options, effort)
    wide = codec.dequantize(whole, 512, options)
    monkeypatch.setattr(pieces, "PIECE_WEIGHTS", 512 * 5)
    parts = codec.quantize(x, options, effort)
    assert whole.keys() == parts.keys()
    if name != "int4":  # the rotation is a matrix product, whose rounding depends on the number of rows
        assert all(torch.equal(as_bytes(whole[suffix]), as_bytes(parts[suffix])) for suffix in whole)
    assert close(codec.dequantize(whole, 512, options), wide, ROTATED)


@pytest.mark.parametrize("name", list(CODECS))
def test_layout_and_file_have_the_sameas_bytes(name: str) -> None:
    codec, shape = CODECS[name], (256, 1024)
    options = codec.options(1024)
    layout, stored = codec.layout(*shape, options), codec.stored(*shape, options)
    assert layout.keys() == stored.keys()
    count: Callable[[tuple[int, ...]], int] = math.prod
    assert all(count(layout[suffix][1]) == count(stored[suffix]) for suffix in layout)


class WithoutFloat8(TorchDispatchMode):
    """As a device that can carry 8-bit floats and do nothing with them. The table of all of them is made elsewhere."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [one for one in args if isinstance(one, Tensor) and one.is_floating_point() and one.itemsize == 1]
        if not func.is_view and any(one.shape != (256,) for one in given):
            raise TypeError(f"{func} of 8-bit floats")
        return func(*args, **kwargs or {})


def floats_of_any_kind(name: str) -> tuple[dict[str, Tensor], Any]:
    """Parts with all bytes that there are, and their options."""
    options, parts = CODECS[name].options(256), {}
    for suffix, (dtype, shape) in CODECS[name].layout(128, 256, options).items():
        kind = TORCH_DTYPES[dtype]
        parts[suffix] = torch.rand(shape) if kind == torch.float32 else torch.randint(256, shape).byte().view(kind)
    return parts, options


@pytest.mark.parametrize("name", ["fp8", "fp8_e5m2", "mxfp8", "nvfp4", "int4", "torchao-fp8", "qfloat8"])
def test_a_device_without_8_bit_floats(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's GPUs: they come there, and give the same weights to the bit."""
    if name in WRITTEN:
        options = CODECS[name].options(256)
        parts = CODECS[name].quantize(weights(128, 256), options)
    else:
        parts, options = floats_of_any_kind(name)
    expected = CODECS[name].dequantize(parts, 256, options)
    monkeypatch.setattr(pieces, "WITHOUT_FLOAT8", ("cpu",))
    weight = QTensor(FORMATS[name], (128, 256), parts, options)
    with WithoutFloat8():
        found = CODECS[name].dequantize(parts, 256, options)
        assert weight.is_finite() == bool(expected.isfinite().all())
        there = weight.to("meta").parts
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    assert {suffix: part.dtype for suffix, part in there.items()} == {
        suffix: part.dtype for suffix, part in parts.items()
    }
