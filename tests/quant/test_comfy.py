"""Codecs of ComfyUI's formats, against comfy-kitchen, which owns them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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
from foreign_codecs import CODECS, COMFY, ROTATED, as_stored, close, cut, weights
from oracles import relative_error

from zimage_lite.errors import FileFormatError
from zimage_lite.quant import comfy
from zimage_lite.quant.inputs import Inputs
from zimage_lite.quant.int8 import Int8Codec

pytestmark = pytest.mark.slow  # loads comfy-kitchen, and with it torch's compiler

SHAPES = [(256, 512), (130, 1024), (64, 256), (7, 2560)]


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
@pytest.mark.parametrize("calibrated", [False, True])
def test_comfy_kitchen_reads_our_int4(shape: tuple[int, int], effort: str, calibrated: bool) -> None:
    x, codec = weights(*shape), CODECS["int4"]
    options = codec.options(shape[1])
    parts = codec.quantize(x, options, effort, Inputs(torch.linspace(0, 1, shape[1])) if calibrated else None)
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


@pytest.mark.parametrize("group", [0, 16, 64, 256])
@pytest.mark.parametrize("effort", ["reference", "best"])
def test_comfy_kitchen_reads_calibrated_int8(group: int, effort: str) -> None:
    x, codec = weights(50, 768), Int8Codec()
    rotation = {"convrot": True, "convrot_groupsize": group} if group else {}
    _, params = TensorWiseINT8Layout.quantize(x, per_channel=True, **rotation)
    parts = codec.quantize(x, {"group": group}, effort, Inputs(torch.linspace(0, 1, 768)))
    theirs = TensorWiseINT8Layout.dequantize(parts[""], replace(params, scale=parts["_scale"]))
    assert close(codec.dequantize(parts, 768, {"group": group}), theirs, ROTATED)
    assert relative_error(theirs, x) < 0.02


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
