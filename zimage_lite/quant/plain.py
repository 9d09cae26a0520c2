"""Floats stored as they are: float32, bfloat16, float16, and plain casts to 8-bit floats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .formats import Format, Parts
from .tensor import TORCH_DTYPES


@dataclass(frozen=True)
class PlainCodec:
    dtype: torch.dtype

    def options(self, columns: int) -> Mapping[str, Any]:
        return {}

    def quantize(self, x: Tensor, options: Mapping[str, Any]) -> Parts:
        return {"": x.to(self.dtype)}

    def dequantize(self, parts: Parts, columns: int, options: Mapping[str, Any]) -> Tensor:
        return parts[""].float()


def codec(row: Format) -> PlainCodec:
    return PlainCodec(TORCH_DTYPES[row.dtype])
