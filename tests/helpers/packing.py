"""Weights packed for tests of the kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zimage_lite.checkpoint.container import Entry, Take, fresh
from zimage_lite.checkpoint.stored import StoredTensor
from zimage_lite.quant.bnb import read_state
from zimage_lite.quant.formats import FORMATS
from zimage_lite.quant.tensor import TORCH_DTYPES, QTensor

H4 = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=np.float64)


def packed_as(name: str, weight: Tensor) -> QTensor:
    """[rows, columns] in that format, as its own codec makes it."""
    chosen = FORMATS[name]
    options = dict(chosen.codec.options(weight.shape[-1])) if weight.ndim == 2 else {}
    if chosen.container == "quanto":  # Triton's interpreter truncates to bfloat16
        options["dtype"] = "F16"
    parts = chosen.codec.quantize(weight, options)
    if name == "nf4":
        options |= read_state(bytes(parts[chosen.codec.state_part].tolist()), name)  # type: ignore[attr-defined]
    return QTensor(chosen, tuple(weight.shape), parts, options)


@dataclass(frozen=True)
class _HeldEntry(Entry):
    """An array whose file is in memory."""

    raw: Tensor = field(default_factory=lambda: torch.empty(0))

    def read(self, start: int = 0, nbytes: int | None = None, into: Take = fresh) -> Tensor:
        stop = self.nbytes if nbytes is None else start + nbytes
        return into(stop - start).copy_(self.raw[start:stop])


def stored(weight: QTensor) -> StoredTensor:
    """As a file would have it."""
    kinds = {dtype: kind for kind, dtype in TORCH_DTYPES.items()}

    def entry(suffix: str, part: Tensor) -> Entry:
        raw = part.contiguous().view(-1).view(torch.uint8)
        return _HeldEntry(Path("memory"), suffix, kinds[part.dtype], tuple(part.shape), 0, raw.nbytes, raw)

    parts = {suffix: entry(suffix, part) for suffix, part in weight.parts.items()}
    return StoredTensor("weight", weight.format, weight.shape, parts, weight.options)


def hadamard(group: int) -> np.ndarray:
    h = np.ones((1, 1))
    while len(h) < group:
        h = np.kron(h, H4)
    return h / np.sqrt(group)


def rotated(x: np.ndarray, group: int) -> np.ndarray:
    x = x.astype(np.float64)
    return (x.reshape(len(x), -1, group) @ hadamard(group).T).reshape(x.shape) if group else x
