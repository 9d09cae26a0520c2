"""ComfyUI's quantized safetensors. A layer's format stands in a `<layer>.comfy_quant` array, or for all layers in the
file's metadata; files from before either have a `scaled_fp8` array and a `scale_weight` beside each weight. 8-bit
floats with a `weight_scale` need no marker: nothing else can be meant."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import FileFormatError, WrongModelError
from ..quant.comfy import COLUMNS_PER_BYTE, MARKER_FORMATS, from_marker
from ..quant.formats import FORMATS, PLAIN_BY_DTYPE
from ..quant.tensor import rows_columns
from .container import Entry, TensorFile
from .stored import FLOATS, StoredTensor, require_layout, single

_MARKER = ".comfy_quant"
_METADATA = "_quantization_metadata"
# About activations, or read here already.
_COMPANIONS = (_MARKER, ".input_scale", ".scale_input", ".scale_weight", "scaled_fp8")

_FP8 = {"F8_E4M3": "fp8", "F8_E5M2": "fp8_e5m2"}
# Of each format, as they follow on ".weight".
_PARTS = {
    "int8": ("", "_scale"), "int4": ("", "_s_rel", "_s_channel", "_codebook"), "convrot_w4a4": ("", "_scale"),
    "fp8": ("", "_scale"), "fp8_e5m2": ("", "_scale"), "mxfp8": ("", "_scale"), "nvfp4": ("", "_scale", "_scale_2"),
}  # fmt: skip
_UNSUPPORTED_PARTS = (".weight_correction", ".pre_quant_scale")


def is_companion(name: str) -> bool:
    """Whether an array says something beside the weights, and may be left out."""
    return name.endswith(_COMPANIONS)


def tensors(file: TensorFile) -> Iterator[StoredTensor]:
    """Every quantized weight of the file. Raises FileFormatError or WrongModelError."""
    markers = _markers(file)
    for layer, marker in markers.items():
        yield _marked(file, layer, marker)
    for name, scale in file.entries.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "scale_weight" or (leaf == "weight_scale" and layer not in markers and _is_fp8(file, layer, scale)):
            yield _unmarked(file, layer, scale)


def _markers(file: TensorFile) -> dict[str, dict[str, Any]]:
    """Layer -> what is said of its format."""
    found = {
        name.removesuffix(_MARKER): _read_marker(entry)
        for name, entry in file.entries.items()
        if name.endswith(_MARKER)
    }
    text = file.metadata.get(_METADATA)
    if text is None:
        return found
    layers = _json_object(text, f"{file.path}: metadata {_METADATA}").get("layers", {})
    if not isinstance(layers, dict) or not all(isinstance(marker, dict) for marker in layers.values()):
        raise FileFormatError(f"{file.path}: metadata {_METADATA} has no map of layers")
    ends = {name.rpartition(".weight")[0]: name for name in file.entries if name.endswith(".weight")}
    for layer, marker in layers.items():
        # Some files name the layers without the prefix that their weights have.
        spelled = layer if layer in ends else next((full for full in ends if full.endswith(f".{layer}")), layer)
        found.setdefault(spelled, marker)
    return found


def _read_marker(entry: Entry) -> dict[str, Any]:
    if entry.nbytes > 4096:
        raise FileFormatError(f"{entry.path}: {entry.name} has {entry.nbytes} bytes", expected="a short JSON text")
    return _json_object(bytes(entry.read().numpy()), f"{entry.path}: {entry.name}")


def _json_object(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{where} is not JSON") from error
    if not isinstance(found, dict):
        raise FileFormatError(f"{where} is not a JSON object")
    return found


def _marked(file: TensorFile, layer: str, marker: Mapping[str, Any]) -> StoredTensor:
    where = f"{file.path}: {layer}"
    kind = marker.get("format")
    if not isinstance(kind, str) or kind not in MARKER_FORMATS:
        known = ", ".join(MARKER_FORMATS)
        raise WrongModelError(
            f"{where}: quantized as {str(kind)[:60]!r}", expected=known, fix="use 16-bit weights instead"
        )
    for leaf in _UNSUPPORTED_PARTS:
        if layer + leaf in file.entries:
            raise WrongModelError(f"{where}{leaf} cannot be read", fix="use a file without it, or 16-bit weights")
    row = FORMATS[MARKER_FORMATS[kind]]
    weight = file.entries.get(f"{layer}.weight")
    if weight is None or len(weight.shape) != 2 or 0 in weight.shape:
        raise FileFormatError(f"{where}: {kind} needs a matrix .weight beside its marker")
    parts = {
        suffix: file.entries[weight.name + suffix]
        for suffix in _PARTS[row.name]
        if weight.name + suffix in file.entries
    }
    columns = weight.shape[1] * COLUMNS_PER_BYTE.get(row.name, 1)
    if row.name == "int4":
        columns = _int4_columns(parts, marker, where)
    options = dict(from_marker(marker, columns, where))
    if row.name == "int4" and weight.shape[1] * 8 == columns * 6:
        options["bits"] = 6
    if row.name in _FP8.values():
        options |= _scales(weight.shape[0], parts.get("_scale"))
    tensor = StoredTensor(weight.name, row, (weight.shape[0], columns), parts, options)
    require_layout(tensor, optional=("_codebook",))
    return tensor


def _int4_columns(parts: Mapping[str, Entry], marker: Mapping[str, Any], where: str) -> int:
    """A byte holds two columns, or three quarters of a byte one: only the scales tell which."""
    scales = parts.get("_s_rel")
    nested = marker.get("params")
    size = {**(nested if isinstance(nested, dict) else {}), **marker}.get("group_size", 16)
    if scales is None or len(scales.shape) != 2 or not isinstance(size, int) or not 1 <= size <= 2**20:
        raise FileFormatError(f"{where}: asym_w4a8_int8 needs a matrix .weight_s_rel and the size of its groups")
    return scales.shape[1] * size


def _is_fp8(file: TensorFile, layer: str, scale: Entry) -> bool:
    """Whether nothing but 8-bit floats and the float scales of all of them, or of each row, can be meant."""
    weight = file.entries.get(f"{layer}.weight")
    return weight is not None and weight.kind in _FP8 and scale.kind in FLOATS


def _unmarked(file: TensorFile, layer: str, scale: Entry) -> StoredTensor:
    """Layers that stayed 16-bit have a scale too in some files, of 1, which is not looked at."""
    weight = file.entries.get(f"{layer}.weight")
    if weight is None or scale.kind not in FLOATS:
        raise FileFormatError(f"{file.path}: {scale.name} ({scale.kind}) is no scale of a weight beside it")
    if weight.kind not in _FP8:
        if weight.kind not in PLAIN_BY_DTYPE:
            raise FileFormatError(f"{file.path}: {weight.name}", got=weight.kind, expected="F8_E4M3 or F8_E5M2")
        return single(weight, PLAIN_BY_DTYPE[weight.kind])
    shape, parts = rows_columns(weight.shape), {"": weight, "_scale": scale}
    tensor = StoredTensor(weight.name, FORMATS[_FP8[weight.kind]], shape, parts, _scales(shape[0], scale))
    require_layout(tensor)
    return tensor


def _scales(rows: int, scale: Entry | None) -> dict[str, Any]:
    """The options of fp8: one scale for all, or one for each row."""
    return {"per_row": True} if scale is not None and rows > 1 and math.prod(scale.shape) == rows else {}
