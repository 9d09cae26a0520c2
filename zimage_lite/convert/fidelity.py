"""How far the written weights are from those they were made of: sums per tensor, figures per group of tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from .recipe import GROUPS


@dataclass(frozen=True)
class Sums:
    """Over the weights x of some rows and what became of them, y."""

    count: int = 0
    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0
    error: float = 0.0  # sum of (x - y)^2
    largest: float = 0.0  # |x - y|

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.count + other.count,
            self.xx + other.xx,
            self.yy + other.yy,
            self.xy + other.xy,
            self.error + other.error,
            max(self.largest, other.largest),
        )

    @property
    def relative_rmse(self) -> float:
        """sqrt(sum (x - y)^2 / sum x^2): 0 is perfect, 1 is as bad as zeros."""
        return math.sqrt(self.error / self.xx) if self.xx else (1.0 if self.error else 0.0)

    @property
    def cosine(self) -> float:
        return self.xy / math.sqrt(self.xx * self.yy) if self.xx and self.yy else float(self.xx == self.yy)


def sums(x: Tensor, y: Tensor) -> Sums:
    """x, y: [rows, columns] float32. Each row is summed in float32 and the rows in float64."""

    def total(a: Tensor, b: Tensor) -> float:
        return float(torch.linalg.vecdot(a, b).double().sum())

    gap = x - y
    return Sums(x.numel(), total(x, x), total(y, y), total(x, y), total(gap, gap), float(gap.abs().max()))


@dataclass(frozen=True)
class TensorError:
    """One written tensor. name: as in the output file; source: its first canonical tensor."""

    name: str
    source: str
    format: str
    nbytes: int
    sums: Sums

    @property
    def group(self) -> str:
        return group_of(self.source)


_VECTORS, _OTHERS = "norms, biases, pads", "other"
GROUP_ORDER = (*GROUPS, _VECTORS, _OTHERS)


def group_of(name: str) -> str:
    """The group of a canonical name in the table of recipe.py, or what kind of tensor it is else."""
    fits = (group for group, patterns in GROUPS.items() if any(fnmatchcase(name, pattern) for pattern in patterns))
    return _VECTORS if not name.endswith(".weight") or "norm" in name else next(fits, _OTHERS)


def by_group(errors: Iterable[TensorError]) -> dict[str, list[TensorError]]:
    """Group -> its tensors, in the order of the table."""
    found: dict[str, list[TensorError]] = {}
    for error in errors:
        found.setdefault(error.group, []).append(error)
    return dict(sorted(found.items(), key=lambda item: GROUP_ORDER.index(item[0])))


def figures(errors: Iterable[TensorError]) -> dict[str, Any]:
    """What a report says of some tensors taken together."""
    errors = list(errors)
    total = sum((error.sums for error in errors), Sums())
    n_bytes = sum(error.nbytes for error in errors)
    return {
        "tensors": len(errors),
        "formats": sorted({error.format for error in errors}),
        "weights": total.count,
        "bytes": n_bytes,
        "bits_per_weight": round(n_bytes * 8 / max(total.count, 1), 4),
        "relative_rmse": _rounded(total.relative_rmse),
        "cosine": _rounded(total.cosine, 9),
        "largest_error": _rounded(total.largest),
    }


def report(errors: Iterable[TensorError]) -> Mapping[str, Any]:
    """Group -> figures, and those of all together."""
    errors = list(errors)
    groups = {group: figures(members) for group, members in by_group(errors).items()}
    return {"groups": groups, "all": figures(errors)}


def _rounded(value: float, digits: int = 5) -> float:
    """To so many significant digits."""
    return float(f"{value:.{digits}g}")
