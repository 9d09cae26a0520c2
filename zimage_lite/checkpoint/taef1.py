"""The file of TAEF1, a tiny decoder for previews: diffusers' whole autoencoder, or the original decoder alone."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from ..config import VaeConfig
from ..errors import WrongModelError
from .checkpoint import Checkpoint
from .opening import open_tensor_file
from .packed import stored_tensors
from .stored import StoredTensor

# diffusers: decoder.layers.0.weight; the original: 1.weight, as its layer 0 has no weights; ComfyUI, when it joins the
# original's two files: taesd_decoder.1.weight.
_NAME = re.compile(r"(?P<prefix>(?:.*decoder\.(?:layers\.)?)?)(?P<layer>\d{1,3})\.(?P<rest>.+)")


def open_taef1(path: Path) -> Checkpoint:
    """Its decoder, named as diffusers names it: layers.0.weight and so on. Raises UserError."""
    file = open_tensor_file(path)
    found: dict[str, list[tuple[int, str, StoredTensor]]] = {}
    for tensor in stored_tensors(file):
        if match := _NAME.fullmatch(tensor.name):
            found.setdefault(match["prefix"], []).append((int(match["layer"]), match["rest"], tensor))
    if not found:
        sample = ", ".join(name[:60] for name in sorted(file.entries)[:3]) or "no tensors"
        raise WrongModelError(f"{path}: no tiny decoder", got=sample, expected="TAEF1, such as taef1_decoder")
    layers = found[max(found)]  # that of a name, if there is one: without, they may be an encoder's
    first = min(layer for layer, _, _ in layers)
    named = {f"layers.{layer - first}.{rest}": tensor for layer, rest, tensor in layers}
    tensors = {name: replace(tensor, name=name) for name, tensor in named.items()}
    shape = tensors["layers.0.weight"].shape if "layers.0.weight" in tensors else ()
    if len(shape) == 4 and shape[1] != VaeConfig.latent_channels:
        raise WrongModelError(
            f"{path}: channels that the decoder takes", got=shape[1], expected=VaeConfig.latent_channels
        )
    return Checkpoint("taef1", path, "TAEF1", tensors, None, file.metadata, {path: file.stamp})
