"""Sixteen levels times a scale that can be certain numbers only: the blocks of int4 and nf4, for scales that are
searched by what errors count, and for rounding that goes column by column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .pieces import count_below

# Of the scale that lays the largest of a block on the outermost level. Clipping it pays where others count more.
_FACTORS = (1.06, 0.94, 0.88, 0.82, 0.76, 0.7)
_REFITS = 2  # of a scale to its codes, and of the codes to it


class Scales(Protocol):
    """What blocks can be multiplied by. Blocks are along the last axis; so are rows where each has one block."""

    def near(self, scale: Tensor) -> Sequence[Tensor]:
        """[blocks] float32 >= 0 -> what stands for the scales that can be stored near it, the nearest first."""
        ...

    def value(self, stored: Tensor) -> Tensor:
        """-> [blocks] float32"""
        ...

    def levels(self, stored: Tensor) -> Tensor:
        """-> [16, blocks] float32, in rising order, the scale in them"""
        ...


class Free:
    """Any scale."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def near(self, scale: Tensor) -> Sequence[Tensor]:
        return (scale,)

    def value(self, stored: Tensor) -> Tensor:
        return stored

    def levels(self, stored: Tensor) -> Tensor:
        return self.table.unsqueeze(1) * stored


class Levels:
    """Of as many blocks as there are rows. values: [elements, rows] float32; codes: the same, uint8; stored: [rows],
    their scales."""

    def __init__(self, scales: Scales, elements: int, stored: Tensor) -> None:
        self.scales, self.stored, self.levels = scales, stored, scales.levels(stored)
        self.values = self.levels.new_zeros(elements, self.levels.shape[1])
        self.codes = torch.zeros_like(self.values, dtype=torch.uint8)

    def sub_blocks(self) -> list[slice]:
        return [slice(0, len(self.values))]

    def __call__(self, column: int, x: Tensor) -> Tensor:
        """x: [rows] -> the nearest that the column can be, which it then is."""
        code = (x * 2 > self.levels[1:] + self.levels[:-1]).sum(0)
        self.codes[column] = code
        torch.gather(self.levels, 0, code.unsqueeze(0), out=self.values[column : column + 1])
        return self.values[column]

    def refit(self, sub: int, pull: Tensor, hessian: Tensor) -> Tensor:
        """The scale to the least error, the codes as they are: least squares, and of what can be stored near it the
        best. pull, hessian: as of `cells.Cells.refit`."""
        value = self.scales.value(self.stored)
        unit = torch.where(value > 0, self.values / value, 0.0)
        wanted = value + (pull * unit).sum(0) / ((hessian @ unit) * unit).sum(0).clamp(min=1e-30)
        codes, best, change = self.codes.long(), torch.zeros_like(value), torch.zeros_like(self.values)
        for stored in self.scales.near(wanted.clamp(min=0)):
            levels = self.scales.levels(stored)
            other = levels.gather(0, codes) - self.values
            gain = (2 * pull * other - (hessian @ other) * other).sum(0)
            better = gain > best
            best, change = torch.where(better, gain, best), torch.where(better, other, change)
            self.stored = torch.where(better, stored, self.stored)
            self.levels = torch.where(better, levels, self.levels)
        self.values += change
        return change


def nearest(levels: Tensor, x: Tensor) -> Tensor:
    """The codes of what is nearest. levels: [16, blocks]; x: [elements, blocks] -> uint8."""
    return count_below(x, (levels[1:] + levels[:-1]) / 2)


def searched(scales: Scales, x: Tensor, counted: Tensor) -> Tensor:
    """The scales of blocks to the least weighted error. x: [elements, blocks] float32; counted: what their squared
    errors count, that broadcasts with it. -> as `scales` stores them, never worse than those that it can store near the
    one which lays the largest on the outermost level."""
    largest = x.abs().amax(0)
    best_error, best, best_values = torch.full_like(largest, torch.inf), scales.near(largest)[0], x

    def attempt(stored: Tensor) -> None:
        nonlocal best_error, best, best_values
        levels = scales.levels(stored)
        values = levels.gather(0, nearest(levels, x).long())
        error = ((values - x).square_() * counted).sum(0)
        better = error < best_error
        best_error, best = torch.where(better, error, best_error), torch.where(better, stored, best)
        best_values = torch.where(better, values, best_values)

    for stored in (*scales.near(largest), *(scales.near(largest * factor)[0] for factor in _FACTORS)):
        attempt(stored)
    for _ in range(_REFITS):
        value = scales.value(best)
        fit = (counted * x * best_values).sum(0) / (counted * best_values.square()).sum(0)
        attempt(scales.near(torch.where(fit > 0, value * fit, value))[0])  # where all values are 0 there is no fit
    return best
