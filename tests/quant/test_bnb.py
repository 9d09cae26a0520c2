"""Codecs of bitsandbytes' formats, against bitsandbytes. Most comparisons are exact."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from foreign_codecs import CODECS, as_stored, cut, weights
from oracles import relative_error
from torch import Tensor

from zimage_lite.errors import FileFormatError
from zimage_lite.quant import bnb
from zimage_lite.quant.inputs import Inputs


@pytest.fixture(scope="module")
def library() -> Any:
    import bitsandbytes.functional  # seconds, which collecting the tests need not take

    return bitsandbytes.functional


def bnb_parts(packed: Tensor, state: Any) -> dict[str, Tensor]:
    return {"": packed, **{f".{key}": part for key, part in state.as_dict(packed=True).items()}}


def bnb_options(parts: dict[str, Tensor], codec: Any) -> dict[str, Any]:
    options = bnb.read_state(bytes(parts[codec.state_part].tolist()), "here")
    del options["shape"]
    return options


@pytest.mark.slow  # bitsandbytes takes seconds to load
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_reads_what_bitsandbytes_writes(library: Any, name: str, blocksize: int, double: bool) -> None:
    codec: Any = CODECS[name]
    for storage in (torch.uint8, torch.bfloat16, torch.float32):
        for rows, columns in ((96, 640), (7, 128), (8, 50)):  # with 50 columns, blocks run across rows
            x = weights(rows, columns)
            packed, state = library.quantize_4bit(
                x, blocksize=blocksize, compress_statistics=double, quant_type=name, quant_storage=storage
            )
            parts = bnb_parts(packed, state)
            ours = codec.dequantize(parts, columns, bnb_options(parts, codec))
            assert torch.equal(ours, library.dequantize_4bit(packed, state))


@pytest.mark.slow  # bitsandbytes takes seconds to load
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [256, 0])
def test_bitsandbytes_reads_what_we_write(library: Any, name: str, nested: int) -> None:
    codec: Any = CODECS[name]
    shape = (130, 1088)  # 2210 blocks: the last nested block is not full
    x, options = weights(*shape), {**codec.options(1088), "nested_blocksize": nested}
    parts = codec.quantize(x, options)
    ours = codec.dequantize(parts, 1088, options)
    stored = as_stored(codec, parts, shape, options)
    state = library.QuantState.from_dict(
        {suffix[1:]: part for suffix, part in stored.items() if suffix}, device=torch.device("cpu")
    )
    assert (state.shape, state.dtype, state.quant_type, state.nested) == (shape, torch.bfloat16, name, nested > 0)
    state.dtype = torch.float32
    assert torch.equal(library.dequantize_4bit(stored[""], state), ours)

    packed, theirs = library.quantize_4bit(x, compress_statistics=nested > 0, quant_type=name)
    assert torch.equal(stored[""], packed)
    if nested:  # bitsandbytes' search of the 256 levels is a little off the nearest
        assert (stored[".absmax"] != theirs.absmax).float().mean() < 0.01
        assert torch.equal(stored[".nested_absmax"], theirs.state2.absmax)
        assert torch.equal(stored[".nested_quant_map"], theirs.state2.code)
    else:
        assert torch.equal(stored[".absmax"], theirs.absmax)
    assert relative_error(ours, x) <= relative_error(library.dequantize_4bit(packed, theirs), x) * 1.0001


@pytest.mark.slow  # bitsandbytes takes seconds to load
@pytest.mark.parametrize("nested", [256, 0])
@pytest.mark.parametrize("effort", ["reference", "best"])
def test_bitsandbytes_reads_what_is_calibrated(library: Any, effort: str, nested: int) -> None:
    codec: Any = CODECS["nf4"]
    shape = (130, 1088)
    x, options = weights(*shape), {**codec.options(1088), "nested_blocksize": nested}
    hessian = torch.eye(1088).add_(0.5).unsqueeze(0)
    parts = codec.quantize(x, options, effort, Inputs(torch.full((1088,), 1.5), hessian))
    stored = as_stored(codec, parts, shape, options)
    state = library.QuantState.from_dict(
        {suffix[1:]: part for suffix, part in stored.items() if suffix}, device=torch.device("cpu")
    )
    state.dtype = torch.float32
    theirs = library.dequantize_4bit(stored[""], state)
    assert torch.equal(theirs, codec.dequantize(parts, 1088, options))
    assert relative_error(theirs, x) < 0.15


def test_bitsandbytes_rows_are_cut() -> None:
    codec: Any = CODECS["nf4"]
    options = codec.options(320)  # 5 blocks a row, so nested blocks of 256 end within rows
    parts = codec.quantize(weights(200, 320), options)
    whole = codec.dequantize(parts, 320, options)
    for start, stop in ((0, 10), (51, 52), (100, 200)):
        some = cut(codec, parts, 320, options, slice(start, stop))
        assert torch.equal(codec.dequantize(some, 320, codec.at_row(options, start)), whole[start:stop])
        again = codec.at_row(codec.at_row(options, start), 0)
        assert again["first_row"] == start


def test_refuses_a_broken_state() -> None:
    good = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 64]}
    assert bnb.read_state(json.dumps(good).encode() + b"   ", "here")["shape"] == (4, 64)
    for bad in (
        {"quant_type": "int3"}, {"quant_type": []}, {"blocksize": 0}, {"blocksize": "x"}, {"shape": None},
        {"shape": ["x"]}, {"shape": [math.inf]}, {"nested_offset": "x"}, {"nested_offset": 1.0, "nested_blocksize": 3},
    ):  # fmt: skip
        with pytest.raises(FileFormatError):
            bnb.read_state(json.dumps({**good, **bad}).encode(), "here")
    for text in (b"", b"\xff", b"[]", b"[" * 100_000):
        with pytest.raises(FileFormatError):
            bnb.read_state(text, "here")


@pytest.mark.slow
def test_bitsandbytes_int8(library: Any) -> None:
    x, codec = weights(60, 640), CODECS["bnb-int8"]
    packed, scale, _ = library.int8_vectorwise_quant(x.half())
    theirs = torch.ops.bitsandbytes.int8_vectorwise_dequant(packed, scale)  # by 1 / 127 in float32: two roundings
    read = codec.dequantize({"": packed, "_scb": scale}, 640, {})
    assert torch.allclose(read, theirs, rtol=3e-7, atol=0)
    parts = codec.quantize(x, {})
    stored = as_stored(codec, parts, (60, 640), {})
    ours = codec.dequantize(parts, 640, {})
    assert torch.allclose(torch.ops.bitsandbytes.int8_vectorwise_dequant(stored[""], stored["_scb"]), ours, rtol=3e-7)
    assert (parts[""] != packed).float().mean() < 0.02  # bitsandbytes rounds weights to float16 first
    assert relative_error(ours, x) <= relative_error(theirs, x) * 1.0001
