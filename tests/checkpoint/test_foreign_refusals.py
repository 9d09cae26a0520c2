"""Files that others made, with something missing, broken or unknown: refused in one line that says which tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_layers import CASES, comfy_file, only_layer_0
from foreign import Weights, write_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.convert.quantize import quantize
from zimage_lite.errors import UserError

pytestmark = pytest.mark.slow  # loads comfy-kitchen, and with it torch's compiler

FILE = "diffusion_pytorch_model.safetensors"

# ---------------------------------------------------------------- ComfyUI


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    folder = write_model(tmp_path_factory.mktemp("comfy") / "model", "comfyui", n_layers=1)
    return load_file(folder / "diffusion_models" / "z_image_turbo.safetensors")


QKV = "layers.0.attention.qkv"
FP8 = torch.zeros(1152, 384).to(torch.float8_e4m3fn)


def marker(**fields: Any) -> Tensor:
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def text(content: bytes) -> Tensor:
    return torch.tensor(list(content), dtype=torch.uint8)


COMFY: dict[str, tuple[str, dict[str, Tensor | None], str]] = {  # -> case, what to change, what the line says
    "a format of which nothing is known": ("int8", {f"{QKV}.comfy_quant": marker(format="awq_w4a16")}, "'awq_w4a16'"),
    "no format": ("int8", {f"{QKV}.comfy_quant": marker(convrot=True)}, "quantized as 'None'"),
    "no JSON": ("int8", {f"{QKV}.comfy_quant": text(b'{"format": "int8_')}, "is not JSON"),
    "no UTF-8": ("int8", {f"{QKV}.comfy_quant": text(b"\xff\xfe")}, "is not JSON"),
    "no object": ("int8", {f"{QKV}.comfy_quant": text(b'["int8_tensorwise"]')}, "is not a JSON object"),
    "a long marker": ("int8", {f"{QKV}.comfy_quant": text(b" " * 5000)}, "5000 bytes"),
    "no scale": ("int8", {f"{QKV}.weight_scale": None}, f"{QKV}.weight_scale is missing"),
    "too few scales": ("int8", {f"{QKV}.weight_scale": torch.ones(1151, 1)}, "expected F32 of shape (1152, 1)"),
    "integer scales": ("int8", {f"{QKV}.weight_scale": torch.ones(1152, 1, dtype=torch.int32)}, "got I32"),
    "no matrix": ("int8", {f"{QKV}.weight": torch.ones(1152, dtype=torch.int8)}, "needs a matrix .weight"),
    "no marker": ("int8", {f"{QKV}.comfy_quant": None}, "no .comfy_quant marker"),
    "a group that does not divide": (
        "int8 in 64", {f"{QKV}.comfy_quant": marker(format="int8_tensorwise", convrot=True)},
        "got 256, expected a power of 4 that divides 384",
    ),
    "a group of no power of 4": (
        "int8 in 64", {f"{QKV}.comfy_quant": marker(format="int8_tensorwise", convrot=True, convrot_groupsize=96)},
        "got 96",
    ),
    "a scale before the weight": ("fp8", {f"{QKV}.pre_quant_scale": torch.ones(384)}, "pre_quant_scale cannot be read"),
    "a correction": ("int4", {f"{QKV}.weight_correction": torch.ones(1152, 24)}, "weight_correction cannot be read"),
    "no relative scale": ("int4", {f"{QKV}.weight_s_rel": None}, "needs a matrix .weight_s_rel"),
    "no channel scale": ("int4", {f"{QKV}.weight_s_channel": None}, "weight_s_channel is missing"),
    "half a codebook": ("int4", {f"{QKV}.weight_codebook": torch.ones(8)}, "expected F32 of shape (16,)"),
    "half of the tiles": ("nvfp4", {f"{QKV}.weight_scale": torch.ones(576, 24).byte()}, "of shape (1152, 24)"),
    "no second scale": ("nvfp4", {f"{QKV}.weight_scale_2": None}, "weight_scale_2 is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", COMFY)
def test_refuses_comfyui(native: Weights, tmp_path: Path, case: str, refused: Callable[..., str]) -> None:
    kind, changes, message = COMFY[case]
    file = tmp_path / "a.safetensors"
    comfy_file(file, only_layer_0(native), CASES[kind][1])
    arrays = {name: tensor for name, tensor in {**load_file(file), **changes}.items() if tensor is not None}
    save_file(arrays, file)
    line = refused("quantize", file, "--to", "q8_0", "-o", tmp_path / "out.gguf")
    assert message in line and str(file) in line and QKV in line, line
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "is not JSON"), ("[]", "is not a JSON object"), ('{"layers": []}', "no map of layers"),
        ('{"layers": {"layers.0.attention.qkv": "int8"}}', "no map of layers"),
        ('{"layers": {"layers.0.attention.qkv": {"format": "int3"}}}', "'int3'"),
        ('{"layers": {"layers.0.attention.none": {"format": "nvfp4"}}}', "needs a matrix .weight"),
    ],
)  # fmt: skip
def test_refuses_comfyui_metadata(native: Weights, tmp_path: Path, metadata: str, message: str) -> None:
    save_file(only_layer_0(native), tmp_path / "a.safetensors", {"_quantization_metadata": metadata})
    with pytest.raises(UserError) as caught:
        open_checkpoint(tmp_path / "a.safetensors")
    assert message in str(caught.value) and str(tmp_path / "a.safetensors") in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{QKV}.weight": FP8, f"{QKV}.scale_weight": torch.ones(2)}, r"got F32 of shape \(2,\), expected F32 of"),
        (
            {f"{QKV}.weight": FP8, f"{QKV}.weight_scale": torch.ones(9, 3)},
            r"got F32 of shape \(9, 3\), expected F32 of",
        ),
        ({f"{QKV}.weight": FP8, f"{QKV}.weight_scale_inv": torch.ones(9, 3)}, "weight_scale_inv scales a weight"),
        ({f"{QKV}.scale_weight": torch.ones((), dtype=torch.int32)}, "is no scale"),
        ({"layers.0.none.scale_weight": torch.ones(())}, "of a weight beside it"),
        ({f"{QKV}.weight": torch.ones(1152, 384, dtype=torch.int8), f"{QKV}.scale_weight": torch.ones(())}, "got I8"),
        ({f"{QKV}.weight": torch.ones(1152, 384, dtype=torch.int8)}, "nothing in the file says how to read it"),
    ],
)
def test_refuses_scaled_fp8(native: Weights, tmp_path: Path, changes: Weights, message: str) -> None:
    save_file({**only_layer_0(native), **changes}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=message):
        open_checkpoint(tmp_path / "a.safetensors")


# ---------------------------------------------------------------- bitsandbytes, quanto, torchao, nunchaku


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("diffusers") / "model", n_layers=1)


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Weights]:
    """What bitsandbytes and quanto make of the model, in one file each."""
    out, made = {}, tmp_path_factory.mktemp("saved")
    for name, target in (("nf4", "nf4"), ("int8", "bnb-int8"), ("qint8", "qint8"), ("qint4", "qint4")):
        quantize(folder / "transformer" / FILE, made / f"{name}.safetensors", target)
        out[name] = load_file(made / f"{name}.safetensors")
    return out | {"plain": load_file(folder / "transformer" / FILE)}


V = "layers.0.attention.to_v"
STATE = f"{V}.weight.quant_state.bitsandbytes__nf4"


def state(cut: int = 9999, **changes: Any) -> Tensor:
    values = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [384, 384], "nested_blocksize": 256,
              "nested_dtype": "float32", "nested_offset": 0.1, **changes}  # fmt: skip
    return torch.tensor(list(json.dumps(values).encode()[:cut]), dtype=torch.uint8)


DIFFUSERS: dict[str, tuple[str, dict[str, Tensor | None], str]] = {
    "a state that was cut": ("nf4", {STATE: state(cut=50)}, "is not the JSON that bitsandbytes writes"),
    "a long state": ("nf4", {STATE: torch.zeros(5000, dtype=torch.uint8)}, "5000 bytes"),
    "a state of another shape": ("nf4", {STATE: state(shape=[384, 385])}, "half as many bytes"),
    "a state of other blocks": ("nf4", {STATE: state(blocksize=48)}, "48"),
    "larger blocks than there are scales for": ("nf4", {STATE: state(blocksize=128)}, "absmax"),
    "no state": ("nf4", {STATE: None}, "nothing in the file says how to read it"),
    "no scales": ("nf4", {f"{V}.weight.absmax": None}, "absmax is missing"),
    "no scales of scales": ("nf4", {f"{V}.weight.nested_absmax": None}, "nested_absmax is missing"),
    "half a map": ("nf4", {f"{V}.weight.quant_map": torch.ones(8)}, "quant_map"),
    "a weight that ends early": ("nf4", {f"{V}.weight": torch.zeros(9, 1, dtype=torch.uint8)}, "half as many bytes"),
    "int8 for one GPU": ("int8", {f"{V}.weight_format": torch.tensor(1, dtype=torch.uint8)}, "for one GPU"),
    "int8 without weight": ("int8", {f"{V}.weight": None}, "has no weight beside it"),
    "int8 without scale": ("int8", {f"{V}.SCB": None}, "nothing in the file says how to read it"),
    "int8 of too few scales": ("int8", {f"{V}.SCB": torch.ones(383)}, "SCB"),
    "quanto without scale": ("qint8", {f"{V}.weight._scale": None}, "and a ._scale"),
    "quanto of too few scales": ("qint8", {f"{V}.weight._scale": torch.ones(383, 1)}, "weight._scale"),
    "quanto of integers": ("qint8", {f"{V}.weight._data": torch.ones(384, 384).short()}, "got I16"),
    "quanto without shift": ("qint4", {f"{V}.weight._shift": None}, "needs a ._scale and a ._shift"),
    "quanto of odd packing": ("qint4", {f"{V}.weight._data._data": torch.zeros(99, 128).byte()}, "got 99 rows"),
    "torchao without scale": ("plain", {f"{V}._weight_qdata": torch.ones(384, 384).char()}, "a _weight_scale beside"),
    "torchao of odd scales": (
        "plain",
        {f"{V}._weight_qdata": torch.ones(384, 384).char(), f"{V}._weight_scale": torch.ones(384, 7)},
        "a divisor of 384",
    ),
    "nunchaku": ("plain", {f"{V}.qweight": torch.ones(384, 192).char()}, "quantize the 16-bit model with --to int4"),
}


@pytest.mark.parametrize("case", DIFFUSERS)
def test_refuses_diffusers(saved: dict[str, Weights], tmp_path: Path, case: str, refused: Callable[..., str]) -> None:
    kind, changes, message = DIFFUSERS[case]
    arrays = {name: tensor for name, tensor in {**saved[kind], **changes}.items() if tensor is not None}
    file = tmp_path / "a.safetensors"
    save_file(arrays, file)
    line = refused("quantize", file, "--to", "q8_0", "-o", tmp_path / "out.gguf")
    assert message in line and str(file) in line, line
    assert V in line or case == "nunchaku", line
    assert list(tmp_path.iterdir()) == [file]


def test_refuses_a_packed_matrix_of_unknown_shape(tmp_path: Path, saved: dict[str, Weights]) -> None:
    """quanto's 4 bits do not say the shape: it follows from the width that the block's norm has."""
    arrays = {name: tensor for name, tensor in saved["qint4"].items() if name != "layers.0.attention_norm1.weight"}
    save_file(arrays, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="nothing tells the shape"):
        open_checkpoint(tmp_path / "a.safetensors")
