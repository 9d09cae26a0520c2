"""Statistics on the disk: our own files, and llama.cpp's, told apart by their first bytes.

Ours are safetensors: of each input `.counts`, `.squares` and `.products`, see `statistics.Moments`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import safetensors
from ..checkpoint.container import Entry, TensorFile
from ..checkpoint.opening import open_tensor_file
from ..checkpoint.writer import open_writer
from ..errors import FileFormatError, UserError
from ..quant.formats import DTYPE_BYTES
from . import imatrix
from .known import Calibration
from .statistics import AGAIN, STEP_RANGES, WEIGHING, Moments, Statistics

KEY = "zimage_lite.calibration"  # metadata: config, settings, prompts and how rows were weighed, as JSON
_COUNTS, _SQUARES, _PRODUCTS = ".counts", ".squares", ".products"
_DTYPES = {_COUNTS: ("F64", torch.float64), _SQUARES: ("F64", torch.float64), _PRODUCTS: ("F32", torch.float32)}


def write(path: Path, statistics: Statistics) -> None:
    """Whole or not at all, in the form that the name's end tells. Raises UserError."""
    if path.suffix in imatrix.SUFFIXES:
        imatrix.write(path, statistics)
        return
    tensors = {f"{name}{part}": tensor for name, own in statistics.inputs.items() for part, tensor in _parts(own)}
    arrays = [(name, _DTYPES[_part(name)][0], tuple(tensor.shape)) for name, tensor in tensors.items()]
    said = {"config": statistics.config, "settings": statistics.settings, "prompts": statistics.prompts}
    said["weighing"] = WEIGHING
    header, offsets = safetensors.encode_header(arrays, {KEY: json.dumps(said, ensure_ascii=False)})
    total = len(header) + sum(DTYPE_BYTES[dtype] * math.prod(shape) for _, dtype, shape in arrays)
    with open_writer(path, header, total, precious=True) as writer:
        for offset, tensor in zip(offsets, tensors.values(), strict=True):
            writer.write(offset, tensor)


def read(path: Path) -> Calibration:
    """What quantizers take of a file; products are read when they are asked for. Raises UserError."""
    if imatrix.is_old(path):
        return imatrix.read_old(path)
    file = open_tensor_file(path)
    if file.container == "gguf":
        return imatrix.read(file)
    said, inputs, products = _said(file), dict[str, Tensor](), dict[str, tuple[Entry, float]]()
    for name, own in _inputs(file).items():
        counts, squares = (_sound(own[part]).sum(0) for part in (_COUNTS, _SQUARES))
        if counts > 0:  # else nothing came in
            inputs[name] = (squares / counts).float()
            if _PRODUCTS in own:
                products[name] = own[_PRODUCTS], float(counts)
    return Calibration(path, said["config"], inputs, products, len(said["prompts"]))


def resume(path: Path) -> Statistics:
    """A file of ours, to be added to. Raises UserError."""
    if path.suffix in imatrix.SUFFIXES:
        raise UserError(f"{path}: an imatrix keeps too little to be added to", fix="gather into a .safetensors file")
    file = open_tensor_file(path)
    said = _said(file)
    inputs = {
        name: Moments(*(_read(own[part]) for part in (_COUNTS, _SQUARES, _PRODUCTS) if part in own))
        for name, own in _inputs(file).items()
    }
    return Statistics(said["config"], said["settings"], said["prompts"], inputs)


def _parts(own: Moments) -> list[tuple[str, Tensor]]:
    found = [(_COUNTS, own.counts), (_SQUARES, own.squares)]
    return found if own.products is None else [*found, (_PRODUCTS, own.products)]


def _part(name: str) -> str:
    return name[name.rindex(".") :]


def _said(file: TensorFile) -> dict[str, Any]:
    try:
        said = json.loads(file.metadata[KEY])
        sound = {key: type(said[key]) for key in _KINDS} == _KINDS
    except (KeyError, ValueError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise FileFormatError(
            f"{file.path}: no statistics", expected="what `zimage-lite calibrate` writes, or an imatrix"
        )
    if said.get("weighing") != WEIGHING:
        raise FileFormatError(
            f"{file.path}: statistics of another version, which weighed rows differently",
            got=str(said.get("weighing", "nothing said"))[:100],
            expected=WEIGHING,
            fix=AGAIN,
        )
    return said


_KINDS = {"config": dict, "settings": dict, "prompts": list}


def _inputs(file: TensorFile) -> dict[str, dict[str, Entry]]:
    """Input -> its parts, of which the sizes go together."""
    found: dict[str, dict[str, Entry]] = {}
    for name, entry in file.entries.items():
        part = _part(name) if "." in name else ""
        if entry.kind != _DTYPES.get(part, ("",))[0]:
            raise FileFormatError(f"{file.path}: tensor {name[:200]} is no statistic")
        found.setdefault(name.removesuffix(part), {})[part] = entry
    for name, own in found.items():
        shapes = {part: entry.shape for part, entry in own.items()}
        columns = shapes.get(_SQUARES, (0, 0))[-1]
        blocks, width = (*shapes.get(_PRODUCTS, (1, columns)), 0, 0)[:2]
        expected = {_COUNTS: (STEP_RANGES,), _SQUARES: (STEP_RANGES, columns)}
        if _PRODUCTS in shapes:
            expected[_PRODUCTS] = (blocks, width, width)
        if shapes != expected or blocks * width != columns:
            raise FileFormatError(f"{file.path}: the statistics of {name[:200]} do not add up", got=shapes)
    return found


def _sound(entry: Entry) -> Tensor:
    """Sums of squares, or counts. Raises FileFormatError if they are none."""
    values = _read(entry)
    if not (values >= 0).all() or values.isinf().any():
        raise FileFormatError(
            f"{entry.path}: {entry.name[:200]} holds NaN, infinite or negative values",
            expected="counts and sums of squares", fix=AGAIN,
        )  # fmt: skip
    return values


def _read(entry: Entry) -> Tensor:
    return entry.read().view(_DTYPES[_part(entry.name)][1]).view(entry.shape)
