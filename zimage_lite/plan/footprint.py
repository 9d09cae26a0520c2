"""What weights take beside the bytes they are stored in: while they are unpacked, or used once before a phase."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache

from zimage_kernels import KINDS

from ..checkpoint.stored import ALIGNMENT, aligned
from ..convert.catalog import Part
from ..memory.workers import READERS
from ..quant.formats import FORMATS, Format
from ..quant.tensor import CPU_PIECE_WEIGHTS, GPU_PIECE_WEIGHTS, piece_rows

REENCODED_AT_ONCE = 2**19  # weights that a CPU turns to int8 while it reads them
ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
STREAM_BYTES = {"bf16": 2, "fp16": 4, "fp32": 4}  # of the residual stream: float16 is too narrow for it

# "layers.17." or "controls.0.control_layers.3.": where a block's name in a tensor's ends.
_BLOCK = re.compile(
    r"(?:(?:controls\.\d+\.control_)?(?:noise_refiner|layers)|encoder\.layers|(?:context|siglip)_refiner)\.\d+(?=\.)"
)
# Bytes per weight while one is unpacked, its result included: the most of a family's formats, as counted on tensors.
_UNPACKING = {"int8": 5, "quanto": 8, "comfy_float": 8}
_MOST_UNPACKING, _GGUF_PY_UNPACKING = 10, 16
_PLAIN = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}  # compute dtype -> the format that is that already


def arena_bytes(parts: Iterable[Part]) -> int:
    """Of a block, each of whose tensors and their parts starts at an aligned place; never less."""
    return sum(aligned(p.n_bytes) + ALIGNMENT * (_n_parts(p.format, p.columns) - 1) for p in parts)


@lru_cache(maxsize=256)
def _n_parts(format: Format, columns: int) -> int:
    return len(format.layout(format.row_group or 1, columns))


def int8_parts(parts: Iterable[Part]) -> list[Part]:
    """As a CPU that multiplies in 8 bits keeps them."""
    return [_int8(part) if is_reencoded(part.format) and part.rows > 1 else part for part in parts]


def _int8(part: Part) -> Part:
    return replace(part, format=FORMATS["int8"], n_bytes=reencoded_bytes(part.format, part.rows, part.columns))


def reencoding_bytes(part: Part) -> int:
    """What a CPU takes for a moment to make int8 of it: some rows unpacked, and rotated; each reader has some as they
    are stored."""
    if not is_reencoded(part.format):
        return 0
    rows = piece_rows(part.format, part.columns, REENCODED_AT_ONCE) if part.format.row_group else part.rows
    rows = min(part.rows, rows)
    stored = part.n_bytes * rows // part.rows
    return _unpacking_bytes(part.format, rows, part.columns, "cpu", "fp32") + 5 * rows * part.columns + READERS * stored


def is_rotated(format: Format) -> bool:
    """Whether such weights stand for rotated integers already, so that turning them to int8 is unpacking them."""
    return format.family == "comfy_int"


def unpacking_bytes(part: Part, device: str, dtype: str) -> int:
    """The most that unpacking one weight takes for a moment. dtype: to compute in."""
    return _unpacking_bytes(part.format, part.rows, part.columns, device, dtype)


@lru_cache(maxsize=256)
def _unpacking_bytes(format: Format, rows: int, columns: int, device: str, dtype: str) -> int:
    if format.name == _PLAIN[dtype]:
        return 0
    if format.family == "plain":
        per_weight = ITEM_BYTES[dtype]
    else:
        per_weight = _UNPACKING.get(format.family, _MOST_UNPACKING)
        if format.container == "gguf" and not format.writable:
            per_weight = _GGUF_PY_UNPACKING
    _, shape = format.layout(rows, columns)[""]
    if format.row_group and shape[:-1] == (rows,):
        limit = CPU_PIECE_WEIGHTS if device == "cpu" else GPU_PIECE_WEIGHTS
        rows = min(rows, piece_rows(format, columns, limit))
    return per_weight * rows * columns


def is_reencoded(format: Format) -> bool:
    """Whether kernels turn such weights to int8 before they are multiplied in 8 bits."""
    return format.name in KINDS


def reencoded_bytes(format: Format, rows: int, columns: int) -> int:
    """Of such a weight's codes and scales, both aligned; 0 for others."""
    return aligned(rows * columns) + aligned(4 * rows) if is_reencoded(format) and rows > 1 else 0


def time_bytes(parts: Sequence[Part]) -> int:
    """What the CPU holds while it computes adaLN vectors: the weights of one block, and the small ones of no block."""
    of_blocks, rest = by_block(parts)

    def held(weights: Iterable[Part]) -> int:
        return sum(part.n_bytes + unpacking_bytes(part, "cpu", "fp32") for part in weights)

    return held(rest) + max(map(held, of_blocks.values()), default=0)


def by_block(parts: Iterable[Part]) -> tuple[dict[str, list[Part]], list[Part]]:
    """-> "layers.17" -> its tensors; and those that belong to no block."""
    blocks: dict[str, list[Part]] = {}
    rest = []
    for part in parts:
        if found := _BLOCK.match(part.name):
            blocks.setdefault(found[0], []).append(part)
        else:
            rest.append(part)
    return blocks, rest
