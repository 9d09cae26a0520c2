"""Which arrays of a file make up one tensor, and in which format: decided by markers and keys, never by the file name.

Formats of other programs that cannot be read yet are recognised here, so that they are refused with a sentence
instead of a missing tensor.
"""

from __future__ import annotations

import json
from typing import Any

from ..errors import FileFormatError, WrongModelError
from ..quant import int8
from ..quant.formats import FORMATS, PLAIN_BY_DTYPE, Format
from ..quant.tensor import rows_columns
from .container import Entry, TensorFile
from .stored import StoredTensor

_MARKER = ".comfy_quant"

# Key suffix -> whose format it is.
_FOREIGN = {
    ".scale_weight": "ComfyUI's scaled fp8",
    ".quant_map": "bitsandbytes 4-bit",
    ".SCB": "bitsandbytes 8-bit",
    "._data": "quanto",
    "._weight_qdata": "torchao",
    ".qweight": "nunchaku (SVDQuant)",
}


def stored_tensors(file: TensorFile) -> list[StoredTensor]:
    """All tensors of a file under their raw names, packed parts grouped."""
    if file.container == "gguf":
        return [_single(entry, FORMATS[entry.kind]) for entry in file.entries.values()]
    _refuse_foreign(file)
    tensors, taken = [], set()
    for name in [name for name in file.entries if name.endswith(_MARKER)]:
        tensor = _comfy_tensor(file, name.removesuffix(_MARKER))
        taken |= {name, *(entry.name for entry in tensor.parts.values())}
        tensors.append(tensor)
    for name, entry in file.entries.items():
        if name in taken:
            continue
        if ".weight_scale" in name:  # ignored, the weight would come out as if its scale were one
            raise WrongModelError(
                f"{file.path}: {name} scales a weight, and no .comfy_quant marker says in which format"
            )
        if entry.kind in PLAIN_BY_DTYPE:
            tensors.append(_single(entry, PLAIN_BY_DTYPE[entry.kind]))
        elif name.endswith(".weight"):
            raise WrongModelError(f"{file.path}: {name} is {entry.kind}, and nothing in the file says how to read it")
    return tensors  # other integer arrays are counters and flags, not weights


def _single(entry: Entry, row: Format) -> StoredTensor:
    return StoredTensor(entry.name, row, entry.shape, {"": entry})


def _comfy_tensor(file: TensorFile, layer: str) -> StoredTensor:
    where = f"{file.path}: {layer}"
    marker = _read_marker(file.entries[layer + _MARKER])
    kind = marker.get("format")
    if kind != int8.MARKER_FORMAT:
        raise WrongModelError(
            f"{where}: quantized as {str(kind)[:60]!r}, which cannot be read yet",
            fix=f"use a file with {int8.MARKER_FORMAT}, a GGUF file, or 16-bit weights",
        )
    weight, scale = (file.entries.get(layer + suffix) for suffix in (".weight", ".weight_scale"))
    if weight is None or scale is None or weight.kind != "I8" or scale.kind != "F32":
        raise FileFormatError(f"{where}: {kind} needs an I8 .weight and an F32 .weight_scale beside its marker")
    rows, columns = rows_columns(weight.shape)
    if scale.nbytes not in (4, 4 * rows):
        raise FileFormatError(f"{where}.weight_scale", got=scale.shape, expected=f"() or ({rows}, 1)")
    options = int8.from_marker(marker, columns, where)
    return StoredTensor(weight.name, FORMATS["int8"], weight.shape, {"": weight, "_scale": scale}, options)


def _read_marker(entry: Entry) -> dict[str, Any]:
    if entry.nbytes > 4096:
        raise FileFormatError(f"{entry.path}: {entry.name} has {entry.nbytes} bytes", expected="a short JSON text")
    try:
        marker = json.loads(bytes(entry.read().numpy()))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{entry.path}: {entry.name} is not JSON") from error
    if not isinstance(marker, dict):
        raise FileFormatError(f"{entry.path}: {entry.name} is not a JSON object")
    return marker


def _refuse_foreign(file: TensorFile) -> None:
    for name in file.entries:
        for suffix, whose in _FOREIGN.items():
            if name.endswith(suffix) or suffix + "." in name:
                raise WrongModelError(
                    f"{file.path}: quantized in the format of {whose}, which cannot be read yet",
                    fix="use 16-bit weights, a GGUF file, or ComfyUI's int8 (convrot)",
                )
