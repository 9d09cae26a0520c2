"""A tensor under its canonical name, still in its file: what it is, where its bytes are, and how to read some rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..quant.formats import DTYPE_BYTES, Format
from ..quant.tensor import TORCH_DTYPES, QTensor, rows_columns
from .container import Entry, Take, fresh


@dataclass(frozen=True)
class StoredTensor:
    """`shape` of this tensor starts at row `first_row` of what is stored: q, k and v may share one stored array."""

    name: str
    format: Format
    shape: tuple[int, ...]
    parts: Mapping[str, Entry]
    options: Mapping[str, Any] = field(default_factory=dict)
    first_row: int = 0

    @property
    def rows(self) -> int:
        return rows_columns(self.shape)[0]

    @property
    def columns(self) -> int:
        return rows_columns(self.shape)[1]

    @property
    def nbytes(self) -> int:
        """Bytes in the file that belong to this tensor."""
        return sum(self.part_bytes())

    def part_bytes(self) -> list[int]:
        """The same for each part."""
        layout = self.format.layout(self.rows, self.columns)
        return [DTYPE_BYTES[dtype] * rows * columns for dtype, (rows, columns) in layout.values()]

    @property
    def where(self) -> str:
        """For messages: the file and the name that the tensor has there."""
        entry = self.parts[""]
        return f"{entry.path}: tensor {entry.name}"

    def read(self, start: int = 0, stop: int | None = None, into: Take = fresh) -> QTensor:
        """Rows [start, stop), packed as stored, in memory that `into` gives."""
        stop = self.rows if stop is None else stop
        layout = self.format.layout(stop - start, self.columns)
        parts = {}
        for suffix, (dtype, shape) in layout.items():
            entry = self.parts[suffix]
            row_bytes = DTYPE_BYTES[dtype] * shape[1]
            if suffix and entry.nbytes == row_bytes:  # one scale for all rows
                parts[suffix] = entry.read().view(TORCH_DTYPES[dtype]).expand(shape)
                continue
            raw = entry.read((self.first_row + start) * row_bytes, shape[0] * row_bytes, into)
            parts[suffix] = raw.view(TORCH_DTYPES[dtype]).view(shape)
        whole = stop - start == self.rows
        shape_read = self.shape if whole else (stop - start, *self.shape[1:])
        return QTensor(self.format, shape_read, parts, self.options)

    def read_float(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) as [rows, columns] float32. Raises UserError if one is not a number."""
        wide = self.read(start, stop).dequantize(torch.float32).reshape(-1, self.columns)
        # The sum is finite only if every term is; two passes of isfinite cost more than the conversion itself.
        if not torch.isfinite(wide.sum()) and not torch.isfinite(wide).all():
            raise self.not_finite()
        return wide

    def gather(self, rows: Sequence[int]) -> Tensor:
        """The given rows as [len(rows), columns] float32; the rest of the table stays on the disk."""
        return torch.cat([self.read_float(row, row + 1) for row in rows])

    def not_finite(self) -> UserError:
        return UserError(f"{self.where} holds NaN or infinite values", fix="the file is damaged, so get it again")
