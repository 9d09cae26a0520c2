"""Codecs of other programs' formats, against the libraries that own them.

A float32 product of the same numbers is the same number, so most comparisons are exact. Where weights are rotated, the
order of a sum of 256 may differ: ROTATED is what that can make of float32. Where a library computes in bfloat16, its
result is the same as ours rounded to bfloat16.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import bitsandbytes.functional as bnb_functional
import pytest
import torch
from comfy_kitchen.tensor import (
    AsymW4A8Int8Layout,
    TensorCoreConvRotW4A4Layout,
    TensorCoreFP8Layout,
    TensorCoreMXFP8Layout,
    TensorCoreNVFP4Layout,
    TensorWiseINT8Layout,
)
from optimum import quanto as quanto_library
from oracles import relative_error
from torch import Tensor
from torchao_values import TORCHAO, W

from zimage_lite.errors import FileFormatError
from zimage_lite.quant import bnb, comfy, comfy_float, comfy_int, pieces, quanto, torchao
from zimage_lite.quant.formats import Codec
from zimage_lite.quant.int8 import Int8Codec
from zimage_lite.quant.tensor import TORCH_DTYPES

COMFY = {**comfy_float.CODECS, **comfy_int.CODECS}
CODECS = {**COMFY, **bnb.CODECS, **quanto.CODECS, **torchao.CODECS}
READ_ONLY = ("mxfp8", "nvfp4", "convrot_w4a4", "torchao-int8", "torchao-fp8")
WRITTEN = tuple(name for name in CODECS if name not in READ_ONLY)
QUANTO = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

ROTATED = 3e-6  # of the largest weight
SHAPES = [(256, 512), (130, 1024), (64, 256), (7, 2560)]


def weights(rows: int, columns: int) -> Tensor:
    """Gaussian, with rows and columns of different size as in a trained model, and a few outliers."""
    x = torch.randn(rows, columns) * 0.02 * torch.randn(rows, 1).exp() * (torch.randn(1, columns) / 3).exp()
    return torch.where(torch.rand(rows, columns) < 1e-3, x * 8, x)


def cut(codec: Codec, stored: dict[str, Tensor], columns: int, options: Any, rows: slice) -> Any:
    """What a reader makes of the parts as stored: some rows of the 2-D ones, reshaped as the layout says."""
    layout = codec.layout(rows.stop - rows.start, columns, options)
    parts = {}
    for suffix, part in stored.items():
        shape = layout[suffix][1]
        if len(shape) == 2:
            parts[suffix] = part.reshape(-1, shape[1])[rows.start : rows.start + shape[0]]
        else:
            parts[suffix] = part
    return parts


def as_stored(codec: Codec, parts: dict[str, Tensor], shape: Any, options: Any) -> dict[str, Tensor]:
    """Parts as they go into a file. Checks them against the layout first."""
    layout, stored = codec.layout(*shape, options), codec.stored(*shape, options)
    assert {suffix: (part.dtype, tuple(part.shape)) for suffix, part in parts.items()} == {
        suffix: (TORCH_DTYPES[dtype], part_shape) for suffix, (dtype, part_shape) in layout.items()
    }
    return {suffix: part.contiguous().reshape(stored[suffix]) for suffix, part in parts.items()}


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


# ---------------------------------------------------------------- ComfyUI


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "library", "tolerance"),
    [
        ("fp8", TensorCoreFP8Layout, 0),
        ("mxfp8", TensorCoreMXFP8Layout, 0),
        ("nvfp4", TensorCoreNVFP4Layout, 0),
        ("convrot_w4a4", TensorCoreConvRotW4A4Layout, ROTATED),
        ("int4", AsymW4A8Int8Layout, ROTATED),
    ],
)
def test_reads_what_comfy_kitchen_writes(name: str, library: Any, tolerance: float, shape: tuple[int, int]) -> None:
    codec, (rows, columns) = CODECS[name], shape
    x = weights(*shape)
    packed, params = library.quantize(x)
    stored = library.state_dict_tensors(packed, params)
    options = codec.options(columns)
    shapes = codec.stored(rows, columns, options)
    assert {suffix: tuple(part.shape) for suffix, part in stored.items()} == shapes
    ours = codec.dequantize(cut(codec, stored, columns, options, slice(0, rows)), columns, options)
    assert close(ours, library.dequantize(packed, params)[:rows, :columns], tolerance)
    assert relative_error(ours, x) < 0.2


@pytest.mark.parametrize(("name", "library"), [("mxfp8", TensorCoreMXFP8Layout), ("nvfp4", TensorCoreNVFP4Layout)])
def test_swizzled_scales_are_cut_at_tiles_of_128_rows(name: str, library: Any) -> None:
    codec, columns = CODECS[name], 704  # 22 and 44 blocks: the last tile of a row is not full with mxfp8
    packed, params = library.quantize(weights(400, columns))
    stored, expected = library.state_dict_tensors(packed, params), library.dequantize(packed, params)
    for start, stop in ((0, 128), (128, 256), (128, 384), (256, 400), (384, 400)):
        parts = cut(codec, stored, columns, {}, slice(start, stop))
        assert torch.equal(codec.dequantize(parts, columns, {}), expected[start:stop])
    assert torch.equal(  # ComfyUI takes scales typed as bytes, too
        codec.dequantize({**stored, "_scale": stored["_scale"].view(torch.uint8)}, columns, {})[:400], expected[:400]
    )


def test_fp8_bytes_are_comfy_kitchens() -> None:
    x = weights(300, 640)
    for name, dtype in (("fp8", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)):
        packed, params = TensorCoreFP8Layout.quantize(x, dtype=dtype)
        ours = CODECS[name].quantize(x, {})
        assert torch.equal(ours[""].view(torch.uint8), packed.view(torch.uint8))
        assert torch.equal(ours["_scale"], params.scale)
        assert torch.equal(CODECS[name].dequantize(ours, 640, {}), TensorCoreFP8Layout.dequantize(packed, params))


@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 16, "convrot_groupsize": 256},
        {"group_size": 16, "convrot_groupsize": 1024},
        {"group_size": 32, "convrot_groupsize": 64},
        {"group_size": 4, "convrot_groupsize": 16},
        {"codebook": False},
        {"bits": 6, "group_size": 32},
        {"scale_dtype": torch.float32},
    ],
    ids=str,
)
def test_reads_every_kind_of_int4(options: dict[str, Any]) -> None:
    x, codec = weights(40, 1024), CODECS["int4"]
    packed, params = AsymW4A8Int8Layout.quantize(x, **options)
    stored = AsymW4A8Int8Layout.state_dict_tensors(packed, params)
    ours = {"group": params.convrot_groupsize, "scale_group": params.group_size, "bits": options.get("bits", 4)}
    parts = cut(codec, stored, 1024, ours, slice(0, 40))
    assert close(codec.dequantize(parts, 1024, ours), AsymW4A8Int8Layout.dequantize(packed, params), ROTATED)


@pytest.mark.parametrize("shape", [(64, 1024), (33, 192), (40, 208)])  # rotated by 256, 64 and 16
@pytest.mark.parametrize("effort", ["fast", "reference", "best"])
def test_comfy_kitchen_reads_our_int4(shape: tuple[int, int], effort: str) -> None:
    x, codec = weights(*shape), CODECS["int4"]
    options = codec.options(shape[1])
    parts = codec.quantize(x, options, effort)
    stored = as_stored(codec, parts, shape, options)
    params = AsymW4A8Int8Layout.Params(
        scale=stored["_s_rel"], s_channel=stored["_s_channel"], codebook=stored["_codebook"], orig_dtype=torch.float32,
        orig_shape=shape, group_size=16, convrot_groupsize=options["group"],
    )  # fmt: skip
    ours = codec.dequantize(parts, shape[1], options)
    assert close(AsymW4A8Int8Layout.dequantize(stored[""], params), ours, ROTATED)


def test_int4_is_nearer_than_comfy_kitchens() -> None:
    x, codec = weights(256, 3840), CODECS["int4"]
    packed, params = AsymW4A8Int8Layout.quantize(x)
    theirs = relative_error(AsymW4A8Int8Layout.dequantize(packed, params), x)
    options = codec.options(3840)
    errors = {
        effort: relative_error(codec.dequantize(codec.quantize(x, options, effort), 3840, options), x)
        for effort in ("fast", "reference", "best")
    }
    assert torch.equal(codec.quantize(x, options)["_codebook"], params.codebook)
    assert errors["best"] < errors["reference"] < errors["fast"] <= theirs * 1.003
    assert errors["reference"] < theirs * 0.99
    assert errors["best"] < theirs * 0.98


@pytest.mark.parametrize("group", [0, 16, 64, 256, 1024])
def test_int8_agrees_with_comfy_kitchen(group: int) -> None:
    x, codec = weights(50, 2048), Int8Codec()
    rotation = {"convrot": True, "convrot_groupsize": group} if group else {}
    packed, params = TensorWiseINT8Layout.quantize(x, per_channel=True, **rotation)
    ours = codec.quantize(x, {"group": group})
    assert (ours[""].short() - packed.short()).abs().max() <= 1  # a rotated weight may fall on the other side of a half
    assert (ours[""] != packed).float().mean() <= (1e-4 if group else 0)
    assert torch.allclose(ours["_scale"], params.scale, rtol=1e-6)
    theirs = TensorWiseINT8Layout.dequantize(packed, params)
    assert close(codec.dequantize({"": packed, "_scale": params.scale}, 2048, {"group": group}), theirs, ROTATED)


def test_markers_round_trip() -> None:
    for name in COMFY:
        options = COMFY[name].options(3840)
        marker = COMFY[name].marker(options)
        assert comfy.MARKER_FORMATS[marker["format"]] == name
        assert comfy.from_marker(marker, 3840, "here") == options
    nested = {"format": "asym_w4a8_int8", "params": {"group_size": 32, "convrot_groupsize": 64}}
    assert comfy.from_marker(nested, 640, "here") == {"group": 64, "scale_group": 32}
    for bad in ({"convrot_groupsize": 100}, {"convrot_groupsize": "256"}, {"group_size": 7}, {"group_size": 0}):
        with pytest.raises(FileFormatError):
            comfy.from_marker({"format": "asym_w4a8_int8", **bad}, 3840, "here")


# ---------------------------------------------------------------- bitsandbytes


def bnb_parts(packed: Tensor, state: Any) -> dict[str, Tensor]:
    return {"": packed, **{f".{key}": part for key, part in state.as_dict(packed=True).items()}}


def bnb_options(parts: dict[str, Tensor], codec: Any) -> dict[str, Any]:
    options = bnb.read_state(bytes(parts[codec.state_part].tolist()), "here")
    del options["shape"]
    return options


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_reads_what_bitsandbytes_writes(name: str, blocksize: int, double: bool) -> None:
    codec: Any = CODECS[name]
    for storage in (torch.uint8, torch.bfloat16, torch.float32):
        for rows, columns in ((96, 640), (7, 128), (8, 50)):  # with 50 columns, blocks run across rows
            x = weights(rows, columns)
            packed, state = bnb_functional.quantize_4bit(
                x, blocksize=blocksize, compress_statistics=double, quant_type=name, quant_storage=storage
            )
            parts = bnb_parts(packed, state)
            ours = codec.dequantize(parts, columns, bnb_options(parts, codec))
            assert torch.equal(ours, bnb_functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [256, 0])
def test_bitsandbytes_reads_what_we_write(name: str, nested: int) -> None:
    codec: Any = CODECS[name]
    shape = (130, 1088)  # 2210 blocks: the last nested block is not full
    x, options = weights(*shape), {**codec.options(1088), "nested_blocksize": nested}
    parts = codec.quantize(x, options)
    ours = codec.dequantize(parts, 1088, options)
    stored = as_stored(codec, parts, shape, options)
    state = bnb_functional.QuantState.from_dict(
        {suffix[1:]: part for suffix, part in stored.items() if suffix}, device=torch.device("cpu")
    )
    assert (state.shape, state.dtype, state.quant_type, state.nested) == (shape, torch.bfloat16, name, nested > 0)
    state.dtype = torch.float32
    assert torch.equal(bnb_functional.dequantize_4bit(stored[""], state), ours)

    packed, theirs = bnb_functional.quantize_4bit(x, compress_statistics=nested > 0, quant_type=name)
    assert torch.equal(stored[""], packed)
    if nested:  # bitsandbytes' search of the 256 levels is a little off the nearest
        assert (stored[".absmax"] != theirs.absmax).float().mean() < 0.01
        assert torch.equal(stored[".nested_absmax"], theirs.state2.absmax)
        assert torch.equal(stored[".nested_quant_map"], theirs.state2.code)
    else:
        assert torch.equal(stored[".absmax"], theirs.absmax)
    assert relative_error(ours, x) <= relative_error(bnb_functional.dequantize_4bit(packed, theirs), x) * 1.0001


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


def test_bitsandbytes_int8() -> None:
    x, codec = weights(60, 640), CODECS["bnb-int8"]
    packed, scale, _ = bnb_functional.int8_vectorwise_quant(x.half())
    theirs = torch.ops.bitsandbytes.int8_vectorwise_dequant(packed, scale)  # by 1 / 127 in float32: two roundings
    read = codec.dequantize({"": packed, "_scb": scale}, 640, {})
    assert torch.allclose(read, theirs, rtol=3e-7, atol=0)
    parts = codec.quantize(x, {})
    stored = as_stored(codec, parts, (60, 640), {})
    ours = codec.dequantize(parts, 640, {})
    assert torch.allclose(torch.ops.bitsandbytes.int8_vectorwise_dequant(stored[""], stored["_scb"]), ours, rtol=3e-7)
    assert (parts[""] != packed).float().mean() < 0.02  # bitsandbytes rounds weights to float16 first
    assert relative_error(ours, x) <= relative_error(theirs, x) * 1.0001


# ---------------------------------------------------------------- quanto


def quantize_with_quanto(x: Tensor, name: str) -> tuple[dict[str, Tensor], Tensor]:
    """What quanto saves of a layer, by full name, and the weight that it computes with.

    As the layer itself does, but without repacking for the CPU at hand, which costs some shifts their last bit.
    """
    linear = torch.nn.Linear(x.shape[1], x.shape[0], bias=False, dtype=x.dtype)
    layer = quanto_library.QLinear.from_module(linear, weights=quanto_library.qtypes[name])
    layer.weight.data, kind, group = x, layer.weight_qtype, layer.weight_group_size
    if kind.bits == 8:
        scales: Any = {"scale": layer.optimizer(x, qtype=kind, axis=0)}
    else:
        scales = dict(zip(("scale", "shift"), layer.optimizer(x, kind, axis=0, group_size=group), strict=True))
    weight = quanto_library.quantize_weight(x, kind, 0, group_size=group, optimized=False, **scales)
    saved: dict[str, Tensor] = {"input_scale": layer.input_scale, "output_scale": layer.output_scale}
    weight.save_to_state_dict(saved, "weight.", False)
    layer.freeze()
    assert {key: part.shape for key, part in layer.state_dict().items()} == {
        key: part.shape for key, part in saved.items()
    }
    return saved, weight.dequantize()


@pytest.mark.slow  # quanto compiles its extension first
@pytest.mark.parametrize("dtype", list(QUANTO))
@pytest.mark.parametrize("name", list(quanto.CODECS))
@pytest.mark.parametrize("shape", [(64, 640), (48, 64), (33, 96), (20, 192), (3, 128)])  # the last: 3 groups, padded
def test_quanto(name: str, dtype: str, shape: tuple[int, int]) -> None:
    codec, x, model_dtype = CODECS[name], weights(*shape), QUANTO[dtype]
    saved, theirs = quantize_with_quanto(x.to(model_dtype), "qfloat8_e4m3fn" if name == "qfloat8" else name)
    options = {**codec.options(shape[1]), "dtype": dtype}
    stored = as_stored(codec, codec.quantize(x, options), shape, options)
    assert {codec.names.get(suffix, "weight" + suffix) for suffix in stored} == set(saved)
    for suffix, part in stored.items():
        expected = saved[codec.names.get(suffix, "weight" + suffix)]
        assert part.shape == expected.shape, suffix
        assert torch.equal(_bytes(part), _bytes(expected)), suffix
    assert torch.equal(codec.dequantize(stored, shape[1], options).to(model_dtype), theirs)

    best = codec.dequantize(codec.quantize(x, options, "best"), shape[1], options)
    assert relative_error(best, x) <= relative_error(theirs.float(), x) * 1.001


# ---------------------------------------------------------------- torchao


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


# ---------------------------------------------------------------- all that can be written


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
        assert all(torch.equal(_bytes(whole[suffix]), _bytes(parts[suffix])) for suffix in whole)
    assert close(codec.dequantize(whole, 512, options), wide, ROTATED)


def _bytes(part: Tensor) -> Tensor:
    return part.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("name", list(CODECS))
def test_layout_and_file_have_the_same_bytes(name: str) -> None:
    codec, shape = CODECS[name], (256, 1024)
    options = codec.options(1024)
    layout, stored = codec.layout(*shape, options), codec.stored(*shape, options)
    assert layout.keys() == stored.keys()
    count: Callable[[tuple[int, ...]], int] = math.prod
    assert all(count(layout[suffix][1]) == count(stored[suffix]) for suffix in layout)
