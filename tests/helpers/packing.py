"""Weights packed for tests of the kernels."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from zimage_lite.quant.bnb import read_state
from zimage_lite.quant.formats import FORMATS
from zimage_lite.quant.tensor import QTensor

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


def hadamard(group: int) -> np.ndarray:
    h = np.ones((1, 1))
    while len(h) < group:
        h = np.kron(h, H4)
    return h / np.sqrt(group)


def rotated(x: np.ndarray, group: int) -> np.ndarray:
    x = x.astype(np.float64)
    return (x.reshape(len(x), -1, group) @ hadamard(group).T).reshape(x.shape) if group else x
