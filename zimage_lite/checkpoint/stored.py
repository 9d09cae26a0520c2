"""A tensor under its canonical name, still in its file: what it is, where its bytes are, and how to read some rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import FileFormatError, UserError
from ..quant.formats import DTYPE_BYTES, Format, Layout, Options
from ..quant.tensor import TORCH_DTYPES, QTensor, all_finite, rows_columns
from ..units import round_up
from .container import Entry, Take, fresh

FLOATS = ("F64", "F32", "F16", "BF16")
ALIGNMENT = 64  # what torch itself gives a tensor
_BYTES = ("U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0")


@dataclass(frozen=True)
class _Piece:
    """Bytes of one stored array, and what they are."""

    entry: Entry
    start: int
    n_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, into: Take) -> Tensor:
        return self.entry.read(self.start, self.n_bytes, into)

    def typed(self, raw: Tensor) -> Tensor:
        values = raw.view(self.dtype)
        if values.numel() == math.prod(self.shape):
            return values.view(self.shape)
        return values.expand(self.shape) if values.numel() == 1 else values


@dataclass(frozen=True)
class StoredTensor:
    """`shape` of this tensor starts at row `first_row` of what is stored: q, k and v may share one stored array."""

    name: str
    format: Format
    shape: tuple[int, ...]
    parts: Mapping[str, Entry]
    options: Options = field(default_factory=dict)
    first_row: int = 0

    @property
    def rows(self) -> int:
        return rows_columns(self.shape)[0]

    @property
    def columns(self) -> int:
        return rows_columns(self.shape)[1]

    @property
    def nbytes(self) -> int:
        """Bytes in the file that belong to this tensor, shared parts included."""
        return sum(self.part_bytes())

    def part_bytes(self) -> list[int]:
        """What each part takes in memory once it is read."""
        if not self._cuts_at(0):
            return [entry.nbytes for entry in self.parts.values()]
        return [
            _bytes_of(dtype, shape)
            for suffix, (dtype, shape) in self._layout(self.rows).items()
            if suffix in self.parts
        ]

    def _layout(self, rows: int) -> Layout:
        return self.format.layout(rows, self.columns, self.options)

    def _cuts_at(self, row: int) -> bool:
        """Whether the stored parts can be cut at this row of the tensor."""
        group = self.format.row_group
        return group > 0 and (self.first_row + row) % group == 0 and len(self._layout(self.rows)[""][1]) == 2

    def piece_rows(self, n_weights: int) -> int:
        """Rows to read at once for about so many weights: all of them where rows cannot be cut."""
        if not self._cuts_at(0):
            return self.rows
        group = self.format.row_group
        return min(max(n_weights // max(self.columns, 1) // group, 1) * group, max(self.rows, 1))

    @property
    def is_as_stored(self) -> bool:
        """Whether its values are those in the file, so that its bytes can be passed on."""
        return True

    @property
    def stored_name(self) -> str:
        """The one that it has in the file."""
        return self.parts[""].name

    @property
    def where(self) -> str:
        """For messages: the file and the name that the tensor has there."""
        return f"{self.parts[''].path}: tensor {self.stored_name}"

    def read(self, start: int = 0, stop: int | None = None, into: Take = fresh) -> QTensor:
        """Rows [start, stop), packed as stored, in memory that `into` gives. Parts that cannot be cut come whole."""
        stop = self.rows if stop is None else stop
        pieces = self._pieces(start, stop)
        return self._packed(start, stop, {suffix: piece.typed(piece.read(into)) for suffix, piece in pieces.items()})

    @property
    def packed_bytes(self) -> int:
        """What `packed_in` takes."""
        return sum(aligned(piece.n_bytes) for piece in self._pieces(0, self.rows).values())

    def packed_in(self, buffer: Tensor) -> QTensor:
        """The whole tensor where `read_to` has put it, or what was copied from there, on any device."""
        places = _split(buffer, self._pieces(0, self.rows))
        return self._packed(0, self.rows, {suffix: piece.typed(raw) for suffix, (piece, raw) in places.items()})

    def read_to(self, buffer: Tensor) -> None:
        """buffer: [packed_bytes] uint8 on the CPU."""
        for piece, raw in _split(buffer, self._pieces(0, self.rows)).values():
            piece.read(lambda _n_bytes, raw=raw: raw)  # type: ignore[misc]

    def forget(self) -> None:
        """Have the system drop what was read from its page cache: it will not be wanted while it could stay there."""
        for piece in self._pieces(0, self.rows).values():
            piece.entry.forget(piece.start, piece.n_bytes)

    def _packed(self, start: int, stop: int, parts: dict[str, Tensor]) -> QTensor:
        shape = self.shape if stop - start == self.rows else (stop - start, *self.shape[1:])
        if not self._cuts_at(start):
            return QTensor(self.format, shape, parts, self.options, self.first_row + start)
        return QTensor(self.format, shape, parts, self.format.codec.at_row(self.options, self.first_row + start))

    def _pieces(self, start: int, stop: int) -> dict[str, _Piece]:
        """What rows [start, stop) take of each part."""
        if not self._cuts_at(start):
            return {
                suffix: _Piece(entry, 0, entry.nbytes, TORCH_DTYPES[entry.kind], entry.shape)
                for suffix, entry in self.parts.items()
            }
        pieces = {}
        for suffix, (dtype, shape) in self._layout(stop - start).items():
            if suffix not in self.parts:
                continue  # an optional one
            entry = self.parts[suffix]
            kind = _dtype(entry, dtype)
            row_bytes = kind.itemsize * shape[1] if len(shape) == 2 else 0
            # One scale may stand for all rows; what does not lie in rows comes whole: nf4 has scales for 256 blocks.
            if not row_bytes or (suffix and entry.nbytes == row_bytes):
                pieces[suffix] = _Piece(entry, 0, entry.nbytes, kind, shape)
            else:
                first = (self.first_row + start) * row_bytes
                pieces[suffix] = _Piece(entry, first, shape[0] * row_bytes, kind, shape)
        return pieces

    def will_read(self, start: int, stop: int) -> None:
        """Tell the system that these rows will be wanted soon, so that the disk works while the processor does."""
        entry, rows = self.parts[""], max(self.rows, 1)
        if self._cuts_at(0):
            row_bytes = self.nbytes // rows
            entry.will_read((self.first_row + start) * row_bytes, (stop - start) * row_bytes)

    def read_float(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) as [rows, columns] float32. Raises UserError if one is not a number."""
        wide = self.read(start, stop).dequantize(torch.float32).reshape(-1, self.columns)
        if not all_finite(wide):
            raise self.not_finite()
        return wide

    def gather(self, rows: Sequence[int]) -> Tensor:
        """The given rows as [len(rows), columns] float32; the rest of the table stays on the disk."""
        return torch.cat([self.read_float(row, row + 1) for row in rows])

    def not_finite(self) -> UserError:
        return UserError(f"{self.where} holds NaN or infinite values", fix="the file is damaged, so get it again")


def single(entry: Entry, row: Format) -> StoredTensor:
    """A tensor that is one array."""
    return StoredTensor(entry.name, row, entry.shape, {"": entry})


def require_layout(tensor: StoredTensor, optional: Sequence[str] = ()) -> None:
    """Raise FileFormatError unless the stored parts have the dtypes and the numbers of bytes that the format says.

    8-bit floats may be typed as bytes, and one scale may stand for all rows.
    """
    layout = tensor.format.layout(tensor.rows, tensor.columns, tensor.options)
    for suffix, (dtype, shape) in layout.items():
        entry = tensor.parts.get(suffix)
        if entry is None and suffix in optional:
            continue
        name = tensor.format.part_name(tensor.name, suffix)
        wanted = f"{dtype} of shape {shape}"
        if entry is None:
            raise FileFormatError(f"{tensor.where}: {name} is missing", expected=wanted)
        n_bytes = _dtype(entry, dtype).itemsize * math.prod(shape)
        one_for_all = suffix and len(shape) == 2 and shape[1] == 1 and entry.nbytes == n_bytes // shape[0]
        if not _may_be(entry.kind, dtype) or (entry.nbytes != n_bytes and not one_for_all):
            raise FileFormatError(f"{entry.path}: {name}", got=f"{entry.kind} of shape {entry.shape}", expected=wanted)


def _may_be(kind: str, dtype: str) -> bool:
    """Bytes may be typed as whatever has 8 bits, and scales as any float."""
    return kind == dtype or (kind in _BYTES and dtype in _BYTES) or (kind in FLOATS and dtype in FLOATS)


def _dtype(entry: Entry, dtype: str) -> torch.dtype:
    """What a part is really stored in, where it should be `dtype`."""
    return TORCH_DTYPES[entry.kind if entry.kind in FLOATS else dtype]


def _bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    return DTYPE_BYTES[dtype] * math.prod(shape)


def aligned(n_bytes: int) -> int:
    return round_up(n_bytes, ALIGNMENT)


def _split(buffer: Tensor, pieces: Mapping[str, _Piece]) -> dict[str, tuple[_Piece, Tensor]]:
    """Where each piece lies in the buffer: one after another, aligned."""
    found, start = {}, 0
    for suffix, piece in pieces.items():
        found[suffix] = piece, buffer[start : start + piece.n_bytes]
        start += aligned(piece.n_bytes)
    return found
