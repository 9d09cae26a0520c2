"""Quantized weights as diffusers and transformers save them: bitsandbytes, optimum-quanto, torchao."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace

from ..errors import FileFormatError, WrongModelError
from ..quant.formats import FORMATS
from ..quant.tensor import rows_columns
from .container import Entry, TensorFile
from .stored import StoredTensor, require_layout

# About activations, or read with the weight.
_COMPANIONS = re.compile(r".*(\.(input_scale|output_scale|weight_format|SCB)|\.quant_state\.bitsandbytes__\w+)")
_STATE = re.compile(r"(.*\.weight)\.quant_state\.bitsandbytes__(nf4|fp4)")
_MAX_STATE_BYTES = 4096


def is_companion(name: str) -> bool:
    """Whether an array says something beside the weights, and may be left out."""
    return _COMPANIONS.fullmatch(name) is not None


def tensors(file: TensorFile) -> Iterator[StoredTensor]:
    """Every quantized weight of the file. Raises FileFormatError or WrongModelError."""
    for name, entry in file.entries.items():
        state = _STATE.fullmatch(name)
        if state:
            yield _four_bit(file, state[1], state[2], entry)
        elif name.endswith(".SCB"):
            yield _eight_bit(file, name.removesuffix(".SCB"), entry)
        elif name.endswith(".weight._data"):
            yield _quanto_bytes(file, name.removesuffix("._data"), entry)
        elif name.endswith(".weight._data._data"):
            yield _quanto_packed(file, name.removesuffix("._data._data"), entry)
        elif name.endswith("._weight_qdata"):
            yield _torchao(file, name.removesuffix("._weight_qdata"), entry)


def _four_bit(file: TensorFile, name: str, kind: str, state_entry: Entry) -> StoredTensor:
    from ..quant.bnb import read_state

    where = f"{file.path}: {state_entry.name}"
    if state_entry.nbytes > _MAX_STATE_BYTES:
        raise FileFormatError(where, got=f"{state_entry.nbytes} bytes", expected="a short JSON text")
    state = read_state(bytes(state_entry.read().numpy()), where)
    shape = state.pop("shape")
    row = FORMATS[kind]
    suffixes = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
    parts = {suffix: file.entries[name + suffix] for suffix in suffixes if name + suffix in file.entries}
    if "" not in parts or parts[""].nbytes * 2 != math.prod(shape):
        raise FileFormatError(where, got=f"shape {shape}", expected=f"half as many bytes in {name}")
    # What was packed into another dtype is the same bytes.
    parts[""] = _as_bytes(parts[""])
    tensor = StoredTensor(name, row, shape, parts, state)
    require_layout(tensor, optional=(row.codec.state_part,))  # type: ignore[attr-defined]
    return tensor


def _as_bytes(entry: Entry) -> Entry:
    return replace(entry, kind="U8", shape=(entry.nbytes,))


def _eight_bit(file: TensorFile, layer: str, scale: Entry) -> StoredTensor:
    weight = file.entries.get(f"{layer}.weight")
    if weight is None:
        raise FileFormatError(f"{file.path}: {scale.name} has no weight beside it")
    parts = {"": weight, "_scb": scale}
    tensor = StoredTensor(weight.name, FORMATS["bnb-int8"], weight.shape, parts)
    require_layout(tensor, optional=("_format",))
    order = file.entries.get(f"{layer}.weight_format")
    if order is not None and any(order.read().tolist()):
        raise WrongModelError(f"{file.path}: {order.name} tells of a layout for one GPU", expected="0, plain rows")
    return tensor


def _quanto_bytes(file: TensorFile, name: str, data: Entry) -> StoredTensor:
    row = {"I8": FORMATS["qint8"], "F8_E4M3": FORMATS["qfloat8"]}.get(data.kind)
    scale = file.entries.get(f"{name}._scale")
    if row is None or scale is None:
        raise WrongModelError(f"{file.path}: {data.name}", got=data.kind, expected="I8 or F8_E4M3, and a ._scale")
    tensor = StoredTensor(name, row, data.shape, {"": data, "._scale": scale}, {"dtype": scale.kind})
    require_layout(tensor, optional=("_input_scale", "_output_scale"))
    return tensor


def _quanto_packed(file: TensorFile, name: str, data: Entry) -> StoredTensor:
    """The file does not say the shape, so it is worked out from tensors beside it."""
    scale, shift = file.entries.get(f"{name}._scale"), file.entries.get(f"{name}._shift")
    if scale is None or shift is None or len(data.shape) != 2 or 0 in data.shape or not scale.shape:
        raise FileFormatError(f"{file.path}: {data.name} needs a ._scale and a ._shift beside it")
    groups, group = scale.shape[0], data.shape[1]
    kind = {-(-groups * 4 // 8): "qint4", -(-groups * 2 // 8): "qint2"}.get(data.shape[0])
    if kind is None:
        wanted = f"half or a quarter of its {groups} scales"
        raise FileFormatError(f"{file.path}: {data.name}", got=f"{data.shape[0]} rows", expected=wanted)
    shape = _quanto_shape(file, name, groups * group)
    options = {"dtype": scale.kind, "group": group}
    tensor = StoredTensor(name, FORMATS[kind], shape, {"": data, "._scale": scale, "._shift": shift}, options)
    require_layout(tensor, optional=("_input_scale", "_output_scale"))
    return tensor


def _quanto_shape(file: TensorFile, name: str, n_weights: int) -> tuple[int, int]:
    """A bias has a number for each row; else rows or columns are those of the residual stream."""
    entries = file.entries
    bias = entries.get(name.removesuffix("weight") + "bias")
    if bias is not None and bias.shape and bias.shape[0] and n_weights % bias.shape[0] == 0:
        return bias.shape[0], n_weights // bias.shape[0]
    prefix = re.match(r"(.*?)(layers|(?:noise|context|siglip)_refiner)\.\d+\.", name)
    norms = ("attention_norm1", "input_layernorm")
    found = [entries.get(f"{prefix[0]}{norm}.weight") for norm in norms] if prefix else []
    width = next((entry.shape[0] for entry in found if entry is not None and entry.shape), 0)
    if not width or n_weights % width:
        raise FileFormatError(f"{file.path}: {name}: nothing tells the shape of its {n_weights} weights")
    writes = name.endswith(("feed_forward.w2.weight", "to_out.0.weight", "o_proj.weight", "down_proj.weight"))
    return (width, n_weights // width) if writes else (n_weights // width, width)


def _torchao(file: TensorFile, layer: str, data: Entry) -> StoredTensor:
    where = f"{file.path}: {data.name}"
    row = {"I8": FORMATS["torchao-int8"], "F8_E4M3": FORMATS["torchao-fp8"]}.get(data.kind)
    scale = file.entries.get(f"{layer}._weight_scale")
    if row is None or scale is None or len(data.shape) != 2 or 0 in data.shape:
        raise WrongModelError(where, got=data.kind, expected="I8 or F8_E4M3, and a _weight_scale beside it")
    rows, columns = rows_columns(data.shape)
    n_scales = math.prod(scale.shape)
    groups = n_scales // rows if n_scales % rows == 0 and n_scales >= rows else 1
    if columns % groups:
        raise FileFormatError(where, got=f"{n_scales} scales", expected=f"a divisor of {columns} for each row")
    parts = {"": data, "_scale": scale}
    zero = file.entries.get(f"{layer}._weight_zero_point")
    if zero is not None:
        parts["_zero_point"] = zero
    tensor = StoredTensor(f"{layer}.weight", row, data.shape, parts, {"group": columns // groups})
    require_layout(tensor, optional=("_zero_point",))
    return tensor
