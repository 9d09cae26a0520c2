"""The GGUF container, version 2 and 3: metadata key-values, tensor infos, then aligned tensors.

Read and written here rather than through gguf-py, whose reader maps the file and takes seconds over a tokenizer, and
whose writer wants whole tensors. As with safetensors, every count and range is checked before it is believed.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from ..errors import FileFormatError, WrongModelError
from ..quant.formats import GGML_NAMES, GGML_TYPES
from ..quant.tensor import rows_columns
from ..units import round_up
from .container import Entry, TensorFile, check_ranges, is_natural, is_shape

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
MAX_HEADER_BYTES = 100_000_000  # a tokenizer takes 6 MB, the largest ones 20
MERGE = "join the parts with llama-gguf-split --merge FIRST_PART OUT.gguf"

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _UINT64 = 4, 5, 6, 7, 8, 9, 10


@dataclass(frozen=True)
class Encoded:
    """A metadata value as it stands in a file, type and all, to be written again as it is."""

    raw: bytes


class _Cursor:
    """Reads little-endian values, and never past the end of the file, nor more than a header can have."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path, self.file = path, file
        self.file_bytes = path.stat().st_size
        self.left = min(self.file_bytes, MAX_HEADER_BYTES)

    def take(self, n_bytes: int) -> bytes:
        if n_bytes > self.left:
            raise FileFormatError(
                f"{self.path}: the GGUF header runs past the end of the file, or past 100 MB", fix="download it again"
            )
        self.left -= n_bytes
        return self.file.read(n_bytes)

    def again(self, start: int) -> bytes:
        """The bytes since `start`, once more."""
        stop = self.file.tell()
        self.file.seek(start)
        return self.file.read(stop - start)

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def count(self, at_least_bytes: int) -> int:
        """A count of things that take at least so many bytes each: more than fit in the file is a lie."""
        n = self.scalar("Q")
        if n * at_least_bytes > self.left:
            raise FileFormatError(f"{self.path}: the GGUF header counts {n} items, more than it has room for")
        return n

    def text(self) -> str:
        raw = self.take(self.count(1))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FileFormatError(f"{self.path}: a name in the GGUF header is not UTF-8") from error

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth > 4:
            raise FileFormatError(f"{self.path}: unknown GGUF value type", got=kind)
        item_kind = self.scalar("I")
        if item_kind in _SCALARS:
            code = _SCALARS[item_kind]
            n = self.count(struct.calcsize(code))
            return list(struct.unpack(f"<{n}{code}", self.take(n * struct.calcsize(code))))
        return [self.value(item_kind, depth + 1) for _ in range(self.count(8))]


def read_header(path: Path) -> TensorFile:
    """Parse and check metadata and tensor infos of `path`. Raises FileFormatError."""
    with open(path, "rb") as file:
        cursor = _Cursor(path, file)
        n_tensors, n_values = _counts(cursor)
        metadata: dict[str, Any] = {}
        for _ in range(n_values):
            key = cursor.text()
            if key in metadata:
                raise FileFormatError(f"{path}: the header has the metadata {key[:200]} twice")
            metadata[key] = cursor.value(cursor.scalar("I"))
        infos = [_tensor_info(cursor) for _ in range(n_tensors)]
        header_bytes = file.tell()
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not is_natural(alignment) or alignment < 1 or alignment & (alignment - 1):
        raise FileFormatError(f"{path}: general.alignment", got=repr(alignment)[:60], expected="a power of two")
    data_start = round_up(header_bytes, alignment)
    entries = [_entry(path, metadata, data_start, alignment, *info) for info in infos]
    by_name = {entry.name: entry for entry in entries}
    if len(by_name) != len(entries):
        raise FileFormatError(f"{path}: the header names a tensor twice")
    _refuse_part(path, metadata, max((entry.offset + entry.nbytes for entry in entries), default=data_start))
    check_ranges(path, entries, cursor.file_bytes, data_start)
    return TensorFile(path, "gguf", by_name, metadata)


def encoded_values(path: Path, prefix: str) -> dict[str, Encoded]:
    """The metadata of `path` whose keys begin with `prefix`, for `encode_header`. Raises FileFormatError."""
    found = {}
    with open(path, "rb") as file:
        cursor = _Cursor(path, file)
        for _ in range(_counts(cursor)[1]):
            key, start = cursor.text(), file.tell()
            cursor.value(cursor.scalar("I"))
            if key.startswith(prefix):
                found[key] = Encoded(cursor.again(start))
    return found


def _counts(cursor: _Cursor) -> tuple[int, int]:
    """Of tensors and of metadata values, after magic and version."""
    cursor.take(4)
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise FileFormatError(f"{cursor.path}: GGUF version", got=version, expected="2 or 3, little-endian")
    return cursor.count(24), cursor.count(13)


def _refuse_part(path: Path, metadata: Mapping[str, Any], data_end: int) -> None:
    """Raise WrongModelError for what llama.cpp's gguf-split makes, which is one header for each part."""
    parts = metadata.get("split.count", 1)
    if not is_natural(parts) or parts < 2:
        return
    with open(path, "rb") as file:
        file.seek(round_up(data_end, DEFAULT_ALIGNMENT))
        if file.read(4) == MAGIC:
            raise WrongModelError(
                f"{path}: the {parts} parts of a split GGUF file, which `cat` does not join", fix=MERGE
            )
    number = metadata.get("split.no")
    which = f"part {number + 1} of {parts}" if is_natural(number) else f"one of {parts} parts"
    raise WrongModelError(f"{path}: {which} of a split GGUF file", fix=MERGE)


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.text()
    rank = cursor.scalar("I")
    if rank > 8:
        raise FileFormatError(f"{cursor.path}: tensor {name[:200]} has {rank} dimensions")
    reversed_shape = [cursor.scalar("Q") for _ in range(rank)]
    return name, tuple(reversed(reversed_shape)), cursor.scalar("I"), cursor.scalar("Q")


def _entry(
    path: Path, metadata: Mapping[str, Any], start: int, alignment: int,
    name: str, shape: tuple[int, ...], type_id: int, offset: int,
) -> Entry:  # fmt: skip
    where = f"{path}: tensor {name[:200]}"
    kind = GGML_NAMES.get(type_id)
    if kind is None:
        raise FileFormatError(f"{where}: ggml type {type_id} is not known")
    _, block, block_bytes = GGML_TYPES[kind]
    columns = shape[-1] if shape else 1
    if not all(map(is_natural, shape)) or columns % block:
        raise FileFormatError(f"{where}: shape {shape} cannot be {kind}, whose blocks have {block} elements")
    if offset % alignment:
        raise FileFormatError(f"{where}: offset {offset} is not a multiple of the alignment {alignment}")
    nbytes = math.prod(shape) // block * block_bytes
    true_shape = metadata.get(f"comfy.gguf.orig_shape.{name}")  # ComfyUI-GGUF flattens ranks above 2
    if true_shape is not None:
        if not is_shape(true_shape) or math.prod(true_shape) != math.prod(shape):
            raise FileFormatError(f"{where}: shape {shape}, but its orig_shape is {repr(true_shape)[:60]}")
        if rows_columns(tuple(true_shape))[1] % block == 0:  # else its rows share blocks, and can only be read flat
            shape = tuple(true_shape)
    return Entry(path, name, kind, shape, start + offset, nbytes)


def encode_header(
    arrays: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, Any]
) -> tuple[bytes, list[int]]:
    """Lay out tensors (name, ggml type, shape) one after another -> header bytes, and each one's offset in the file.

    Metadata values: int (uint32), float (float32), bool, str, lists of int (int32) or str, or another file's `Encoded`.
    """
    tensors = list(arrays)
    out = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        out.append(_text(key) + _value(value))
    offsets, at = [], 0
    for name, kind, shape in tensors:
        type_id, block, block_bytes = GGML_TYPES[kind]
        out.append(_text(name) + struct.pack("<I", len(shape)))
        out.append(struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", type_id, at))
        offsets.append(at)
        nbytes = math.prod(shape) // block * block_bytes
        at += round_up(nbytes, DEFAULT_ALIGNMENT)
    raw = b"".join(out)
    raw += b"\0" * (-len(raw) % DEFAULT_ALIGNMENT)
    return raw, [len(raw) + offset for offset in offsets]


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    if isinstance(value, Encoded):
        return value.raw
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if value and isinstance(value[0], str):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
    return struct.pack(f"<IIQ{len(value)}i", _ARRAY, _INT32, len(value), *value)
