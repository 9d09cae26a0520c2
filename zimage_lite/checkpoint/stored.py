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
from .container import Entry, Take, fresh

_FLOATS = ("F32", "F16", "BF16")
_BYTES = ("U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0")


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
    def where(self) -> str:
        """For messages: the file and the name that the tensor has there."""
        entry = self.parts[""]
        return f"{entry.path}: tensor {entry.name}"

    def read(self, start: int = 0, stop: int | None = None, into: Take = fresh) -> QTensor:
        """Rows [start, stop), packed as stored, in memory that `into` gives. Parts that cannot be cut come whole."""
        stop = self.rows if stop is None else stop
        whole = stop - start == self.rows
        shape = self.shape if whole else (stop - start, *self.shape[1:])
        if not self._cuts_at(start):
            parts = {suffix: _typed(entry, entry.read(into=into)) for suffix, entry in self.parts.items()}
            return QTensor(self.format, shape, parts, self.options, self.first_row + start)
        parts = {}
        for suffix, (dtype, part_shape) in self._layout(stop - start).items():
            if suffix not in self.parts:
                continue  # an optional one
            entry = self.parts[suffix]
            if len(part_shape) != 2:
                # All of it, whatever rows are read: nf4 has scales for 256 blocks, wherever they lie.
                shared = entry.read().view(_dtype(entry, dtype))
                parts[suffix] = shared if part_shape else shared.view(())
                continue
            row_bytes = _dtype(entry, dtype).itemsize * part_shape[1]
            if suffix and entry.nbytes == row_bytes:  # one scale for all rows
                parts[suffix] = entry.read().view(_dtype(entry, dtype)).expand(part_shape)
                continue
            raw = entry.read((self.first_row + start) * row_bytes, part_shape[0] * row_bytes, into)
            parts[suffix] = raw.view(_dtype(entry, dtype)).view(part_shape)
        options = self.format.codec.at_row(self.options, self.first_row + start)
        return QTensor(self.format, shape, parts, options)

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
    return kind == dtype or (kind in _BYTES and dtype in _BYTES) or (kind in _FLOATS and dtype in _FLOATS)


def _dtype(entry: Entry, dtype: str) -> torch.dtype:
    """What a part is really stored in, where it should be `dtype`."""
    return TORCH_DTYPES[entry.kind if entry.kind in _FLOATS else dtype]


def _bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    return DTYPE_BYTES[dtype] * math.prod(shape)


def _typed(entry: Entry, raw: Tensor) -> Tensor:
    return raw.view(TORCH_DTYPES[entry.kind]).view(entry.shape)
