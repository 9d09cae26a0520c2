"""Codecs of other programs' formats: what holds for all of them, and torchao's, by values that it gave."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from foreign_codecs import CODECS, ROTATED, as_bytes, close, weights
from oracles import relative_error
from torch import Tensor
from torchao_values import TORCHAO, W

from zimage_lite.quant import pieces

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
