"""Layers as comfy-kitchen packs them, and files of them as ComfyUI writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from comfy_kitchen.tensor import (
    AsymW4A8Int8Layout,
    TensorCoreConvRotW4A4Layout,
    TensorCoreFP8Layout,
    TensorCoreMXFP8Layout,
    TensorCoreNVFP4Layout,
    TensorWiseINT8Layout,
)
from foreign import Weights, canonical, is_block_matrix
from safetensors.torch import save_file
from torch import Tensor

ROTATED = 3e-6  # of the largest weight: the order of a rotation's sums may differ

# A layer as a file holds it: suffix on ".weight" -> array; the marker; and the weight that comfy-kitchen gets from it.
Layer = tuple[Weights, dict[str, Any], Tensor]


def int8(x: Tensor, group: int = 0, per_channel: bool = True) -> Layer:
    group = group if x.shape[1] % max(group, 1) == 0 else 0
    rotation = {"convrot": True, "convrot_groupsize": group} if group else {}
    packed, params = TensorWiseINT8Layout.quantize(x, per_channel=per_channel, **rotation)
    stored = TensorWiseINT8Layout.state_dict_tensors(packed, params)
    assert params.scale.numel() == (len(x) if per_channel else 1)
    return stored, {"format": "int8_tensorwise", **rotation}, TensorWiseINT8Layout.dequantize(packed, params)


def int4(x: Tensor, group_size: int = 16, **options: Any) -> Layer:
    sizes = {"group_size": group_size, "convrot_groupsize": 256 if x.shape[1] % 256 == 0 else 64}
    packed, params = AsymW4A8Int8Layout.quantize(x, **sizes, **options)
    stored = AsymW4A8Int8Layout.state_dict_tensors(packed, params)
    assert ("_codebook" in stored) == (not options)
    return stored, {"format": "asym_w4a8_int8", **sizes}, AsymW4A8Int8Layout.dequantize(packed, params)


def convrot_w4a4(x: Tensor) -> Layer:
    sizes = {"convrot_groupsize": 256 if x.shape[1] % 256 == 0 else 64}
    packed, params = TensorCoreConvRotW4A4Layout.quantize(x, **sizes)
    wide = TensorCoreConvRotW4A4Layout.dequantize(packed, params)
    marker = {"format": "convrot_w4a4", "quant_group_size": 64, "linear_dtype": "int4", **sizes}
    return TensorCoreConvRotW4A4Layout.state_dict_tensors(packed, params), marker, wide


def scaled(layout: Any, name: str, **options: Any) -> Callable[[Tensor], Layer]:
    def pack(x: Tensor) -> Layer:
        packed, params = layout.quantize(x, **options)
        wide = layout.dequantize(packed, params)[: x.shape[0], : x.shape[1]]
        return layout.state_dict_tensors(packed, params), {"format": name}, wide

    return pack


def typed(pack: Callable[[Tensor], Layer], suffix: str, dtype: torch.dtype) -> Callable[[Tensor], Layer]:
    """The same bytes under another dtype."""

    def packed(x: Tensor) -> Layer:
        stored, marker, wide = pack(x)
        return {**stored, suffix: stored[suffix].view(dtype)}, marker, wide

    return packed


fp8 = scaled(TensorCoreFP8Layout, "float8_e4m3fn")
fp8_e5m2 = scaled(TensorCoreFP8Layout, "float8_e5m2", dtype=torch.float8_e5m2)
mxfp8 = scaled(TensorCoreMXFP8Layout, "mxfp8")
nvfp4 = scaled(TensorCoreNVFP4Layout, "nvfp4")

CASES: dict[str, tuple[str, Callable[[Tensor], Layer], float]] = {  # -> our name of the format, how, tolerance
    "int8": ("int8", int8, 0),
    "int8 of one scale": ("int8", lambda x: int8(x, 0, per_channel=False), 0),
    "int8 in 64": ("int8", lambda x: int8(x, 64), ROTATED),
    "int8 in 256": ("int8", lambda x: int8(x, 256), ROTATED),
    "int4": ("int4", int4, ROTATED),
    "int4 in 32": ("int4", lambda x: int4(x, 32), ROTATED),
    "int4 without codebook": ("int4", lambda x: int4(x, codebook=False), ROTATED),
    "6 bits": ("int4", lambda x: int4(x, 32, bits=6, scale_search=False), ROTATED),
    "convrot_w4a4": ("convrot_w4a4", convrot_w4a4, ROTATED),
    "fp8": ("fp8", fp8, 0),
    "fp8 as bytes": ("fp8", typed(fp8, "", torch.uint8), 0),
    "fp8_e5m2": ("fp8_e5m2", fp8_e5m2, 0),
    "mxfp8": ("mxfp8", typed(mxfp8, "_scale", torch.float8_e8m0fnu), 0),
    "mxfp8, scales as bytes": ("mxfp8", typed(mxfp8, "_scale", torch.uint8), 0),
    "nvfp4": ("nvfp4", nvfp4, 0),
}  # fmt: skip
STYLES = ("arrays", "nested", "metadata", "metadata without prefix")


def comfy_file(path: Path, native: Weights, pack: Callable[[Tensor], Layer], style: str = "arrays", prefix: str = ""):
    """Write all matrices of the blocks packed. Returns what every tensor is to be read as, under canonical names."""
    arrays: Weights = {}
    layers, expected = {}, {}
    for name, tensor in native.items():
        expected[name] = tensor
        if not is_block_matrix(name, tensor):
            arrays[prefix + name] = tensor
            continue
        stored, marker, expected[name] = pack(tensor.float())
        arrays |= {prefix + name + suffix: part.contiguous() for suffix, part in stored.items()}
        layer = name.removesuffix(".weight")
        if style == "nested":
            marker = {"format": marker.pop("format"), "params": marker}
        if style.startswith("metadata"):
            layers[layer if "without" in style else prefix + layer] = marker
        else:
            text = json.dumps({**marker, "full_precision_matrix_mult": True}).encode()
            arrays[f"{prefix}{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
        arrays[f"{prefix}{layer}.input_scale"] = torch.tensor(2.0)  # of activations: says nothing of the weight
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})} if layers else {}
    save_file(arrays, path, metadata)
    return canonical(expected)


def only_layer_0(native: Weights) -> Weights:
    """All that a file needs to be recognised: faster, where the rest adds nothing."""
    kept = ("layers.0.", "noise_refiner.0.attention.", "x_embedder.", "cap_embedder.")
    return {name: tensor for name, tensor in native.items() if name.startswith(kept)}
