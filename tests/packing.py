"""Weights packed for tests of the kernels."""

from __future__ import annotations

from torch import Tensor

from zimage_lite.quant.bnb import read_state
from zimage_lite.quant.formats import FORMATS
from zimage_lite.quant.tensor import QTensor


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
