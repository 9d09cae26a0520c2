"""Floats stored as they are: float32, bfloat16, float16, and plain casts to 8-bit floats."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .formats import Codec, Format, Layout, Options, Parts
from .inputs import Inputs
from .tensor import TORCH_DTYPES


@dataclass(frozen=True)
class PlainCodec(Codec):
    dtype: str

    def layout(self, rows: int, columns: int, options: Options) -> Layout:
        return {"": (self.dtype, (rows, columns))}

    def quantize(self, x: Tensor, options: Options, effort: str = "reference", inputs: Inputs | None = None) -> Parts:
        return {"": x.to(TORCH_DTYPES[self.dtype])}

    def dequantize(self, parts: Parts, columns: int, options: Options) -> Tensor:
        return parts[""].float()


def codec(row: Format) -> PlainCodec:
    return PlainCodec(row.dtype)
