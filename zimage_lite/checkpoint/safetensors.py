"""The safetensors container: 8 bytes of header length, a JSON header, then the arrays without gaps.

The header is untrusted: its length is bounded before it is read, and every shape, dtype and byte range is checked
against the file. Written files start their data at a multiple of 4096 bytes, so that blocks can be read unbuffered.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import FileFormatError
from ..quant.formats import DTYPE_BYTES
from .container import Entry, TensorFile, check_ranges, is_shape

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
DATA_ALIGNMENT = 4096


def read_header(path: Path, file_bytes: int | None = None) -> TensorFile:
    """Parse and check the header of `path`, a file that will have so many bytes. Raises FileFormatError."""
    file_bytes = path.stat().st_size if file_bytes is None else file_bytes
    with open(path, "rb") as file:
        prefix = file.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
            raise FileFormatError(
                f"{path}: not a safetensors or GGUF file, or a truncated one",
                got=f"a header of {header_bytes} bytes in a file of {file_bytes}",
            )
        raw = file.read(header_bytes)
    header = _parse_json(path, raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FileFormatError(f"{path}: __metadata__ is not a map of strings")
    start = 8 + header_bytes
    entries = [_entry(path, name, info, start) for name, info in header.items()]
    check_ranges(path, entries, file_bytes, start)
    return TensorFile(path, "safetensors", {entry.name: entry for entry in entries}, metadata)


def _parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise FileFormatError(f"{path}: the header names a tensor twice")
        for text in (*found, *found.values()):
            if isinstance(text, str):
                text.encode()  # half of a surrogate pair, which JSON can spell, is no text
        return found

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or an integer of thousands of digits
        raise FileFormatError(f"{path}: the header is not JSON in UTF-8, so this is no safetensors file") from error
    if not isinstance(header, dict):
        raise FileFormatError(f"{path}: the header is not a JSON object, so this is no safetensors file")
    return header


def _entry(path: Path, name: str, info: object, start: int) -> Entry:
    where = f"{path}: tensor {name[:200]}"
    if not isinstance(info, dict):
        raise FileFormatError(f"{where}: its header entry is not an object")
    dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise FileFormatError(
            f"{where}: unknown dtype", got=repr(dtype)[:60], expected="one of " + ", ".join(DTYPE_BYTES)
        )
    if not is_shape(shape):
        raise FileFormatError(f"{where}: the shape is not a list of whole numbers")
    if not is_shape(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FileFormatError(f"{where}: data_offsets are not [begin, end]")
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if nbytes != offsets[1] - offsets[0]:
        raise FileFormatError(f"{where}: shape {shape} of {dtype} needs {nbytes} bytes, got {offsets[1] - offsets[0]}")
    return Entry(path, name, dtype, tuple(shape), start + offsets[0], nbytes)


def encode_header(
    arrays: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, list[int]]:
    """Lay out arrays (name, dtype, shape) one after another -> header bytes, and each array's offset in the file.

    An array must start at a multiple of its element size, so callers put small odd-sized ones last.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, at = [], 0
    for name, dtype, shape in arrays:
        nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        offsets.append(at)
        at += nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-(len(raw) + 8) % DATA_ALIGNMENT)
    return struct.pack("<Q", len(raw)) + raw, [8 + len(raw) + offset for offset in offsets]
