"""The grid of a block of ggml's, for rounding that goes column by column: `scale * v - minimum` in each sub-block, with
v an integer or one of a table."""

from __future__ import annotations

import torch
from torch import Tensor

from .klayouts import Scales
from .refine import Grid
from .search import IQ4_BORDERS, IQ4_VALUES, divide

_SINGULAR = 1e-6  # of a determinant, as a share of what it is the difference of


class Cells:
    """Of as many blocks as there are rows. values: [elements, rows] float32; codes: the same in uint8, as stored."""

    def __init__(self, grid: Grid, elements: int, scales: Scales) -> None:
        self.grid, self.own = grid, grid.scales == (1, 1)  # own: scales are no multiples of the block's
        self.d, self.dmin = scales.d[:, 0], scales.dmin[:, 0]
        self.sc, self.mn = scales.sc.t().contiguous(), scales.mn.t().contiguous()
        self.values = scales.d.new_zeros(elements, len(scales.d))
        self.codes = torch.zeros_like(self.values, dtype=torch.uint8)
        self.levels, self.borders = (
            torch.tensor(own, dtype=torch.float32, device=self.d.device) for own in (IQ4_VALUES, IQ4_BORDERS)
        )
        self.scale, self.minimum = self.d * self.sc, self.dmin * self.mn
        self.inverse = _inverse(self.scale)

    @property
    def scales(self) -> Scales:
        return Scales(self.d.unsqueeze(1), self.sc.t(), self.dmin.unsqueeze(1), self.mn.t())

    def sub_blocks(self) -> list[slice]:
        step = self.grid.sub_block
        return [slice(at, at + step) for at in range(0, len(self.values), step)]

    def __call__(self, column: int, x: Tensor) -> Tensor:
        """x: [rows] -> the nearest that the column can be, which it then is."""
        sub, value, code = column // self.grid.sub_block, self.values[column], self.codes[column]
        torch.add(x, self.minimum[sub], out=value).mul_(self.inverse[sub])
        if self.grid.table:
            torch.bucketize(value, self.borders, right=True, out=(index := torch.empty_like(value, dtype=torch.int64)))
            code.copy_(index)
            torch.index_select(self.levels, 0, index, out=value)
        else:
            value.round_().clamp_(self.grid.low, self.grid.high)
            code.copy_(value - self.grid.low)
        return value.mul_(self.scale[sub]).sub_(self.minimum[sub])

    def refit(self, sub: int, pull: Tensor, hessian: Tensor) -> Tensor:
        """The scale and the minimum of a sub-block to the least error, its codes as they are: of x = scale v - minimum,
        least squares in two unknowns, and of what can be stored near them the best.

        pull: [columns, rows], H (wanted - x), with all that surrounds them; hessian: [columns, columns]. -> [columns,
        rows], by what x changes."""
        grid, own = self.grid, slice(sub * self.grid.sub_block, (sub + 1) * self.grid.sub_block)
        v = self.levels[self.codes[own].int()] if grid.table else self.codes[own].float().add_(grid.low)
        p, a = (pull * v).sum(0), ((hessian @ v) * v).sum(0)
        b = q = torch.zeros_like(p)
        c = torch.ones_like(p)
        if grid.minima[1]:
            b, q, c = -(hessian.sum(1) @ v), -pull.sum(0), hessian.sum().expand_as(p)
        determinant = a * c - b * b
        wanted = torch.where(determinant > _SINGULAR * a * c, (p * c - b * q) / determinant, 0.0)
        scale, minimum = self.scale[sub].clone(), self.minimum[sub].clone()
        best = torch.zeros_like(p)
        now = [self.sc[sub], self.mn[sub], self.d, self.dmin]
        for near in (0,) if self.own else (-1, 0, 1):
            sc, d = self._stored(scale + wanted, self.d, grid.scales, near)
            ds = d * sc - scale
            mn, dmin = self._stored(minimum + (q - b * ds) / c, self.dmin, grid.minima, 0)
            dm = dmin * mn - minimum
            gain = 2 * (p * ds + q * dm) - (a * ds * ds + 2 * b * ds * dm + c * dm * dm)
            better = gain > best
            best = torch.where(better, gain, best)
            now = [torch.where(better, new, old) for new, old in zip((sc, mn, d, dmin), now, strict=True)]
        self.sc[sub], self.mn[sub], self.d, self.dmin = now
        self.scale[sub], self.minimum[sub] = self.d * self.sc[sub], self.dmin * self.mn[sub]
        self.inverse[sub] = _inverse(self.scale[sub])
        before = self.values[own].clone()
        torch.mul(v, self.scale[sub], out=self.values[own]).sub_(self.minimum[sub])
        return self.values[own] - before

    def _stored(self, value: Tensor, step: Tensor, bounds: tuple[int, int], near: int) -> tuple[Tensor, Tensor]:
        """-> the integer and what it is multiplied by, of the nearest that can be stored, or so many steps off it."""
        if bounds == (0, 0):
            return torch.zeros_like(value), step
        if self.own:
            return torch.ones_like(value), value.half().float()
        whole = torch.where(step == 0, 0.0, value / step).round_().add_(near)
        return whole.clamp_(*bounds), step


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, divide(1, scale))
