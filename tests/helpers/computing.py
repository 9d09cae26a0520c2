"""Ways to compute a block, and its weights packed."""

from __future__ import annotations

import importlib

import pytest
import torch
from packing import packed_as
from torch import Tensor

from zimage_lite.model.compute import Compute
from zimage_lite.quant.tensor import QTensor

HALF, FULL = torch.float16, torch.float32
INT8 = {backend: Compute(backend, int8=True) for backend in ("reference", "triton")}
PLAIN = {backend: Compute(backend) for backend in ("reference", "triton")}


def packed(weight: Tensor, name: str) -> QTensor:
    """In that format, or plain where its rows do not fit: w2 has 682 columns here."""
    return packed_as(name if weight.ndim == 2 and (name == "f32" or weight.shape[1] % 16 == 0) else "f32", weight)


def as_on_turing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter as a GPU of compute capability 7.5, on which no kernel with products may be launched."""
    monkeypatch.setattr("zimage_kernels._triton.capability", lambda device: 75)
    for op in ("linear_int8", "swiglu_int8", "attention"):
        monkeypatch.setattr(importlib.import_module(f"zimage_kernels.{op}"), f"_{op}_kernel", None)
