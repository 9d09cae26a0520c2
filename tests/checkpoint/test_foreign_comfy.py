"""ComfyUI's quantized files: read as comfy-kitchen reads them, written so that comfy-kitchen reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_kitchen.tensor import (
    AsymW4A8Int8Layout,
    TensorCoreFP8Layout,
    TensorWiseINT8Layout,
)
from comfy_layers import (
    CASES,
    ROTATED,
    STYLES,
    Layer,
    comfy_file,
    int8,
    nvfp4,
    only_layer_0,
)
from foreign import Weights, assert_reads, canonical, forward, is_block_matrix, write_model
from marking import always
from oracles import psnr, relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor

from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.checkpoint.model_files import open_model
from zimage_lite.config import GenerateOptions, RuntimeOptions
from zimage_lite.convert.quantize import quantize
from zimage_lite.errors import UserError
from zimage_lite.pipeline.drawing import Pipeline

pytestmark = pytest.mark.slow  # whole models, written and read by other libraries


def plain_file(path: Path, expected: Weights) -> Path:
    save_file({name: tensor.float().contiguous() for name, tensor in expected.items()}, path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("comfy") / "model", "comfyui", n_layers=1)


@pytest.fixture(scope="module")
def native(model: Path) -> Weights:
    """Under the names of ComfyUI's own files, qkv fused."""
    return load_file(model / "diffusion_models" / "z_image_turbo.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_reads_what_comfyui_reads(native: Weights, tmp_path: Path, case: str) -> None:
    name, pack, tolerance = CASES[case]
    file = tmp_path / "a.safetensors"
    expected = comfy_file(file, native, pack)
    checkpoint = open_checkpoint(file)
    assert checkpoint.main_format == name
    assert checkpoint.bytes_by_format().keys() == {name, "bf16"}
    assert_reads(checkpoint, expected, tolerance)
    # It runs packed, and says the same as the unpacked weights. int8 multiplies codes before scales.
    wanted = forward(plain_file(tmp_path / "plain.safetensors", expected))
    assert relative_error(forward(file), wanted) <= 1e-5
    assert wanted.std() > 0.1

    lines: list[str] = []
    written = quantize(file, tmp_path / "out.gguf", "q8_0", measure=True, note=lines.append)
    assert len(lines) == 1 and f"the source is {name} already" in lines[0]
    errors = [error for error in written[0].errors if error.format == "q8_0"]
    assert len(errors) == 6 and all(0.001 < error.sums.relative_rmse < 0.02 for error in errors)
    again = open_checkpoint(tmp_path / "out.gguf").tensors
    for tensor in ("layers.0.attention.to_k.weight", "layers.0.feed_forward.w2.weight"):
        assert 0.001 < relative_error(again[tensor].read_float(), expected[tensor]) < 0.02


@pytest.mark.parametrize("case", ["int8", "int8 of one scale", "6 bits", "nvfp4", "fp8"])
def test_becomes_int8(native: Weights, tmp_path: Path, case: str) -> None:
    """Also what is int8 already: passed on where it is rotated alike, else rotated anew."""
    name, pack, _ = CASES[case]
    expected = comfy_file(tmp_path / "a.safetensors", only_layer_0(native), pack)
    with pytest.raises(UserError, match="missing"):  # nothing is written of half a model
        quantize(tmp_path / "a.safetensors", tmp_path / "out.safetensors", "int8")
    expected = comfy_file(tmp_path / "a.safetensors", native, pack)
    lines: list[str] = []
    out = tmp_path / "out.safetensors"
    (written,) = quantize(tmp_path / "a.safetensors", out, "int8", measure=True, note=lines.append)
    assert [f"the source is {name} already" in line for line in lines] == ([] if name == "int8" else [True])
    tensors = open_checkpoint(out).tensors
    for tensor, truth in expected.items():
        if is_block_matrix(tensor, truth):
            assert tensors[tensor].format.name == "int8"
            assert 0 < relative_error(tensors[tensor].read_float(), truth) < 0.015, tensor
    assert {error.format for error in written.errors} == {"int8", "bf16"}


def test_the_same_int8_is_passed_on(native: Weights, tmp_path: Path) -> None:
    """Scales of one number become one for each row, which is what is written here; no weight changes."""

    def pack(x: Tensor) -> Layer:
        group = next(group for group in (256, 64) if x.shape[1] % group == 0)
        stored, marker, _ = int8(x, group)
        stored["_scale"] = torch.tensor(0.001)
        params = TensorWiseINT8Layout.Params(
            scale=stored["_scale"], orig_dtype=x.dtype, orig_shape=tuple(x.shape), convrot=True, convrot_groupsize=group
        )
        return stored, marker, TensorWiseINT8Layout.dequantize(stored[""], params)

    expected = comfy_file(tmp_path / "a.safetensors", native, pack)
    (written,) = quantize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "int8", measure=True)
    assert all(error.sums.error == 0 for error in written.errors)
    assert_reads(open_checkpoint(tmp_path / "b.safetensors"), expected, ROTATED)
    stored = load_file(tmp_path / "b.safetensors")
    assert stored["layers.0.attention.qkv.weight_scale"].shape == (1152, 1)


@pytest.mark.parametrize("prefix", always("model.diffusion_model.", of=["", "model.diffusion_model."]))
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("case", ["int8 in 64", "int4 in 32", "nvfp4"])
def test_markers(native: Weights, tmp_path: Path, case: str, style: str, prefix: str) -> None:
    """The sizes of groups are not the usual ones, so a marker that is not read would show."""
    name, pack, tolerance = CASES[case]
    file = tmp_path / "a.safetensors"
    expected = comfy_file(file, only_layer_0(native), pack, style, prefix)
    checkpoint = open_checkpoint(file)
    assert checkpoint.main_format == name and checkpoint.layout.startswith("ComfyUI")
    assert_reads(checkpoint, expected, tolerance)


@pytest.mark.parametrize("case", ["mxfp8", "nvfp4"])
def test_slices_of_qkv_that_cut_tiles_of_scales(tmp_path: Path, case: str) -> None:
    """k and v begin at rows 192 and 384, and tiles are of 128 rows: they are read whole and then cut."""
    shapes = {
        "cap_embedder.1.weight": (192, 128), "cap_embedder.0.weight": (128,), "x_embedder.weight": (192, 64),
        "layers.0.attention.qkv.weight": (576, 192), "layers.0.attention.q_norm.weight": (64,),
        "noise_refiner.0.attention.out.weight": (192, 192), "layers.0.feed_forward.w1.weight": (512, 192),
    }  # fmt: skip
    native = {name: torch.randn(shape) for name, shape in shapes.items()}
    expected = comfy_file(tmp_path / "a.safetensors", native, CASES[case][1])
    assert_reads(open_checkpoint(tmp_path / "a.safetensors"), expected)


def test_an_image_from_an_nvfp4_file(model: Path, native: Weights, tmp_path: Path) -> None:
    expected = comfy_file(tmp_path / "a.safetensors", native, nvfp4)
    request = GenerateOptions("a red circle", 64, 64, steps=2, seed=1)

    def draw(file: Path) -> Tensor:
        pipeline = Pipeline(open_model(model, {"transformer": file}), RuntimeOptions("cpu"))
        return pipeline.generate([request])[0]

    image = draw(tmp_path / "a.safetensors")
    assert psnr(image, draw(plain_file(tmp_path / "plain.safetensors", expected)), 255) >= 50
    assert psnr(image, draw(model / "diffusion_models" / "z_image_turbo.safetensors"), 255) < 50  # 4 bits do show


# ---------------------------------------------------------------- before the markers


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_scaled_fp8(native: Weights, tmp_path: Path, dtype: torch.dtype, prefix: str) -> None:
    arrays, expected = {f"{prefix}scaled_fp8": torch.zeros(2, dtype=dtype)}, {}
    for name, tensor in native.items():
        expected[name] = arrays[prefix + name] = tensor
        if not is_block_matrix(name, tensor):
            continue
        layer, shape = prefix + name.removesuffix(".weight"), (1,) if "w1" in name else ()
        arrays[f"{layer}.scale_input"] = torch.full(shape, 3.0)
        if "refiner" in name:  # stayed 16-bit, with a scale that means nothing
            arrays[f"{layer}.scale_weight"] = torch.full(shape, 1.0)
            continue
        packed, params = TensorCoreFP8Layout.quantize(tensor.float(), dtype=dtype)
        arrays |= {prefix + name: packed, f"{layer}.scale_weight": params.scale.reshape(shape)}
        expected[name] = packed.float() * params.scale
    save_file(arrays, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert_reads(checkpoint, canonical(expected))
    assert checkpoint.main_format == ("fp8" if dtype == torch.float8_e4m3fn else "fp8_e5m2")
    wanted = forward(plain_file(tmp_path / "plain.safetensors", canonical(expected)))
    assert relative_error(forward(tmp_path / "a.safetensors"), wanted) <= 1e-5


@pytest.mark.parametrize("leaf", ["scale_weight", "weight_scale", "marked"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_fp8_scales_of_any_kind(native: Weights, tmp_path: Path, leaf: str, scale_dtype: torch.dtype) -> None:
    """One for each row, as [N, 1] or [N], or one for all; of any float, with or without a marker."""
    arrays, expected = {}, {}
    for name, tensor in native.items():
        expected[name] = arrays[name] = tensor
        if not is_block_matrix(name, tensor):
            continue
        layer, wide = name.removesuffix(".weight"), tensor.float()
        shape = (-1,) if "w1" in name else (1,) if "w3" in name else () if "out" in name else (-1, 1)
        largest = wide.abs().amax(1) if -1 in shape else wide.abs().amax()
        scale = (largest / 448).to(scale_dtype).reshape(shape)
        rows = scale.float().reshape(-1, 1)
        arrays[name] = (wide / rows).clamp(-448, 448).to(torch.float8_e4m3fn)
        arrays[f"{layer}.{'weight_scale' if leaf == 'marked' else leaf}"] = scale
        expected[name] = arrays[name].float() * rows
        if leaf == "marked":
            marker = list(b'{"format": "float8_e4m3fn"}')
            arrays[f"{layer}.comfy_quant"] = torch.tensor(marker, dtype=torch.uint8)
    save_file(arrays, tmp_path / "a.safetensors")
    assert_reads(open_checkpoint(tmp_path / "a.safetensors"), canonical(expected))
    wanted = forward(plain_file(tmp_path / "plain.safetensors", canonical(expected)))
    assert relative_error(forward(tmp_path / "a.safetensors"), wanted) <= 1e-5
    quantize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "fp8")  # with one scale, as ComfyUI wants it
    stored = load_file(tmp_path / "b.safetensors")
    assert {stored[name].shape for name in stored if name.endswith("weight_scale")} == {torch.Size()}
    assert relative_error(forward(tmp_path / "b.safetensors"), wanted) < 0.1  # rounded once more, to 3 bits


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_casts_to_fp8(native: Weights, tmp_path: Path, dtype: torch.dtype) -> None:
    """Norms and biases, too."""
    cast = {name: tensor.to(dtype) for name, tensor in native.items()}
    save_file(cast, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert_reads(checkpoint, canonical(cast))
    lines: list[str] = []
    quantize(tmp_path / "a.safetensors", tmp_path / "out.gguf", "q8_0", note=lines.append)
    assert "the source is f8_e" in lines[0]
    assert forward(tmp_path / "out.gguf").isfinite().all()


# ---------------------------------------------------------------- what we write


def by_comfy_kitchen(stored: Weights, layer: str) -> Tensor:
    """As ComfyUI's loader puts the arrays of a layer together."""
    marker = json.loads(bytes(stored[f"{layer}.comfy_quant"].tolist()))
    name = f"{layer}.weight"
    weight, kind = stored[name], marker["format"]
    common = {"orig_dtype": torch.float32, "orig_shape": tuple(weight.shape)}
    if kind == "asym_w4a8_int8":
        assert weight.dtype == torch.int8 and stored[f"{name}_s_rel"].dtype == torch.float8_e4m3fn
        common["orig_shape"] = (len(weight), weight.shape[1] * 2)
        params: Any = AsymW4A8Int8Layout.Params(
            scale=stored[f"{name}_s_rel"], s_channel=stored[f"{name}_s_channel"], codebook=stored[f"{name}_codebook"],
            group_size=marker["group_size"], convrot_groupsize=marker["convrot_groupsize"], **common,
        )  # fmt: skip
        return AsymW4A8Int8Layout.dequantize(weight, params)
    scale = stored[f"{name}_scale"]
    assert scale.dtype == torch.float32
    if kind == "float8_e4m3fn":
        assert weight.dtype == torch.float8_e4m3fn and scale.shape == ()
        return TensorCoreFP8Layout.dequantize(weight, TensorCoreFP8Layout.Params(scale=scale, **common))
    assert kind == "int8_tensorwise" and weight.dtype == torch.int8
    rotation = {"convrot": marker.get("convrot", False), "convrot_groupsize": marker.get("convrot_groupsize", 256)}
    return TensorWiseINT8Layout.dequantize(weight, TensorWiseINT8Layout.Params(scale=scale, **rotation, **common))


@pytest.mark.parametrize(("target", "loss"), [("int8", 0.02), ("int4", 0.1), ("fp8", 0.04)])
def test_comfy_kitchen_reads_what_we_write(model: Path, native: Weights, tmp_path: Path, target: str, loss: float):
    quantize(model, tmp_path / "out", target, text_encoder_to=target)
    encoder = load_file(model / "text_encoders" / "qwen_3_4b.safetensors")
    for component, sources in (("transformer", native), ("text_encoder", encoder)):
        (file,) = (tmp_path / "out" / component).glob("*.safetensors")
        stored, ours = load_file(file), open_checkpoint(file).tensors
        layers = [name.removesuffix(".comfy_quant") for name in stored if name.endswith(".comfy_quant")]
        is_packed = is_block_matrix if component == "transformer" else lambda name, t: ".layers." in name and t.ndim > 1
        assert {f"{layer}.weight" for layer in layers} == {name for name, t in sources.items() if is_packed(name, t)}
        for layer in layers:
            theirs, name = by_comfy_kitchen(stored, layer), f"{layer}.weight"
            parts = canonical({name: theirs}) if component == "transformer" else {name.removeprefix("model."): theirs}
            for part, wide in parts.items():
                limit = 0 if target == "fp8" else ROTATED * wide.abs().max()
                assert (ours[part].read_float() - wide).abs().max() <= limit, part
            assert relative_error(theirs, sources[name]) < loss, name
