"""Rounding that makes up for its errors: what a column is off by is put right in those that are still to be rounded,
as far as their inputs go together (GPTQ, arXiv 2210.17323; the same as LDLQ).

With H the mean of x^T x and H^-1 = U^T U, a column that was rounded with the error e leaves e / U_jj times U_j: to
those after it. Formats differ in what a column can be rounded to, which may depend on what is there by then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .klayouts import Scales
from .refine import Grid
from .search import IQ4_VALUES, divide

_STEP = 32  # columns whose errors are kept back from those further on


class Nearest(Protocol):
    """What the columns of a group can be rounded to."""

    def __call__(self, column: int, x: Tensor) -> Tensor:
        """x: [rows], the column as it is by now -> what it becomes. column: counts from the first of the group."""
        ...


def counted(factor: Tensor) -> Tensor:
    """[columns]: what a column's squared error counts when all that follow make up for it."""
    return factor.diagonal(dim1=1, dim2=2).square().reciprocal().flatten()


def compensate(x: Tensor, factor: Tensor, group: int, fit: Callable[[int, Tensor], Nearest]) -> None:
    """x: [rows, columns] float32; factor: `Inputs.factor`; group: columns that `fit` is asked for together, with the
    first of them and [rows, group] as they are by then."""
    w, width = x.t().contiguous(), factor.shape[1]
    for start in range(0, len(w), group):
        stop = start + group
        nearest = fit(start, w[start:stop].t().contiguous())
        for first in range(start, stop, _STEP):
            _round(w, first, min(first + _STEP, stop), start, nearest, factor, width)


def _round(w: Tensor, first: int, last: int, start: int, nearest: Nearest, factor: Tensor, width: int) -> None:
    """Columns [first, last), each in its block of the factor; then the rest of the last block."""
    errors = w.new_zeros(last - first, w.shape[1])
    for column in range(first, last):
        block, at = divmod(column, width)
        end = min(last - block * width, width)
        row = factor[block, at]
        error = (w[column] - nearest(column - start, w[column])) / row[at]
        w[column + 1 : block * width + end].addr_(row[at + 1 : end], error, alpha=-1)
        errors[column - first] = error
    block = (last - 1) // width
    begin, end = block * width, (block + 1) * width
    if last < end:
        seen = max(first, begin)
        w[last:end].addmm_(
            factor[block, seen - begin : last - begin, last - begin :].t(), errors[seen - first :], alpha=-1
        )


class Cells:
    """The grid of a block with its scales: `scale * v - minimum` with v an integer or one of a table. scale, minimum:
    [rows, sub-blocks]; table: [values] rising, or none."""

    def __init__(
        self, scale: Tensor, minimum: Tensor, bounds: tuple[int, int], sub_block: int, table: Tensor | None
    ) -> None:
        self.scale, self.minimum = scale.t().contiguous(), minimum.t().contiguous()
        self.inverse = torch.where(self.scale == 0, 0.0, divide(1, self.scale))
        self.low, self.high, self.sub_block, self.table = *bounds, sub_block, table
        self._codes: list[Tensor] = []

    @classmethod
    def of(cls, grid: Grid, s: Scales) -> Cells:
        table = torch.tensor(IQ4_VALUES, dtype=torch.float32, device=s.sc.device) if grid.table else None
        return cls(s.d * s.sc, s.dmin * s.mn, (grid.low, grid.high), grid.sub_block, table)

    def __call__(self, column: int, x: Tensor) -> Tensor:
        sub = column // self.sub_block
        scale, minimum = self.scale[sub], self.minimum[sub]
        v = (x + minimum) * self.inverse[sub]
        if self.table is None:
            v = v.round_().clamp_(self.low, self.high)
            self._codes.append((v - self.low).to(torch.uint8))
        else:
            borders = (self.table[1:] + self.table[:-1]) / 2
            index = torch.bucketize(v, borders, right=True)
            self._codes.append(index.to(torch.uint8))
            v = self.table[index]
        return scale * v - minimum

    def codes(self) -> Tensor:
        """[rows, columns] uint8, as stored."""
        return torch.stack(self._codes, dim=1)
