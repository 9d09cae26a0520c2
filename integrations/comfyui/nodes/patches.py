"""What ComfyUI's loaders ask of a MODEL's weights, as an adapter of ours.

A LoRA loader's patches become a file that our transformer takes beside weights of any format, planned and streamed with
them. What has no place there is refused."""

from __future__ import annotations

import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter, OFTAdapter
from safetensors.torch import save_file
from torch import Tensor

from zimage_lite.config import Lora
from zimage_lite.errors import UserError

# Of an adapter's `weights`: what each one is called in a file. None: has no place here.
_SPELLED: dict[type, tuple[str | None, ...]] = {
    LoRAAdapter: ("lora_up.weight", "lora_down.weight", "alpha", None, "dora_scale", None),
    LoHaAdapter: ("hada_w1_a", "hada_w1_b", "alpha", "hada_w2_a", "hada_w2_b", None, None, "dora_scale"),
    LoKrAdapter: (
        "lokr_w1", "lokr_w2", "alpha", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", None, "dora_scale",
    ),
    OFTAdapter: ("oft_blocks", "rescale", "alpha", "dora_scale"),
}  # fmt: skip
_DIFFERENCE = {"weight": "diff", "bias": "diff_b"}
_QKV = ("to_q", "to_k", "to_v")
_PREFIX = "diffusion_model."


class Written:
    """An adapter as a file that lives as long as this. lora: it, and its strength; uuid: by which ComfyUI tells it."""

    def __init__(self, tensors: Mapping[str, Tensor], strength: float) -> None:
        folder = tempfile.mkdtemp(prefix="zimage-lite-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        path = Path(folder) / "patches.safetensors"
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)
        self.lora, self.uuid = Lora(str(path), strength), uuid.uuid4()


def written(patches: Mapping[Any, Any], strength: float, strength_model: float) -> Written:
    """patches: as `ModelPatcher.add_patches` gets them. Raises UserError that names what cannot be applied."""
    if strength_model != 1:
        raise UserError("a patch that scales the model's own weights, as merging does", fix="merge models before")
    tensors: dict[str, Tensor] = {}
    for key, patch in patches.items():
        module, leaf = _module(key)
        for name, tensor in _tensors(patch, leaf, module):
            tensors[f"{module}.{name}"] = tensor
    return Written(tensors, strength)


def _module(key: Any) -> tuple[str, str]:
    """-> the module that is patched, and its "weight" or "bias"."""
    name, offset, *more = (key, None) if isinstance(key, str) else key
    module, _, leaf = name.removeprefix(_PREFIX).rpartition(".")
    if any(function is not None for function in more):
        raise UserError(f"{module}: a patch that computes its change by a function")
    if leaf not in _DIFFERENCE:  # a pad token, which is a parameter of its own
        module, leaf = name.removeprefix(_PREFIX), "weight"
    if offset is None:
        return module, leaf
    axis, first, rows = offset
    if axis or first % rows or not module.endswith(".qkv"):
        raise UserError(f"{module}: a patch of rows {first} to {first + rows} of its weight")
    return f"{module.removesuffix('qkv')}{_QKV[first // rows]}", leaf


def _tensors(patch: Any, leaf: str, module: str) -> Iterator[tuple[str, Tensor]]:
    """Of one module, under the names of files."""
    if isinstance(patch, tuple):
        yield _DIFFERENCE[leaf], _difference(patch, module)
        return
    spelled = _SPELLED.get(type(patch))
    if spelled is None:
        raise UserError(f"{module}: a patch of kind {getattr(patch, 'name', type(patch).__name__)} is not applied here")
    for name, value in zip(spelled, patch.weights, strict=True):
        if value is None:
            continue
        if name is None:
            raise UserError(f"{module}: this {patch.name} is for a convolution, or pads a weight; Z-Image has neither")
        yield name, value if isinstance(value, Tensor) else torch.tensor(float(value))


def _difference(patch: tuple[Any, ...], module: str) -> Tensor:
    kind, values = ("diff", patch) if len(patch) == 1 else patch
    if kind != "diff" or len(values) != 1:
        raise UserError(f"{module}: a patch of kind {kind}{' that pads' * (len(values) > 1)} is not applied here")
    return values[0]
