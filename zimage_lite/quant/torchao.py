"""torchao's weight-only formats, as diffusers saves them: `torchao-int8` and `torchao-fp8`. Read only.

w = (qdata - zero_point) * scale, one scale for each group of columns, usually the whole row; fp8 has no zero points.
Source: torchao 0.18.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .formats import Codec, Format, Layout, Options, Parts
from .pieces import from_float8, widen


@dataclass(frozen=True)
class TorchaoCodec(Codec):
    """options: {"group": columns that share a scale}. The zero points may be missing."""

    dtype: str
    names: ClassVar[Mapping[str, str]] = {
        "": "_weight_qdata",
        "_scale": "_weight_scale",
        "_zero_point": "_weight_zero_point",
    }

    def options(self, columns: int) -> Options:
        return {"group": columns}

    def layout(self, rows: int, columns: int, options: Options) -> Layout:
        groups = columns // options["group"]
        layout: Layout = {"": (self.dtype, (rows, columns)), "_scale": ("F32", (rows, groups))}
        return layout | ({"_zero_point": ("I8", (rows, groups))} if self.dtype == "I8" else {})

    def dequantize(self, parts: Parts, columns: int, options: Options) -> Tensor:
        rows, groups = parts[""].shape[0], columns // options["group"]
        data, scale, zero = (_grouped(parts.get(suffix), rows, groups) for suffix in ("", "_scale", "_zero_point"))
        assert data is not None and scale is not None

        def unpack(piece: slice) -> Tensor:
            wide = from_float8(data[piece])
            if zero is not None:
                wide -= zero[piece]
            return wide.mul_(scale[piece].float()).view(-1, columns)

        return widen(rows, columns, unpack)


def _grouped(part: Tensor | None, rows: int, groups: int) -> Tensor | None:
    """[rows, groups, columns of a group], or [rows, groups, 1] of what a group shares. One for all rows is repeated."""
    if part is None:
        return None
    return part.expand(rows, groups, 1) if part.numel() == 1 else part.reshape(rows, groups, -1)


CODECS: dict[str, Codec] = {"torchao-int8": TorchaoCodec("I8"), "torchao-fp8": TorchaoCodec("F8_E4M3")}


def codec(row: Format) -> Codec:
    return CODECS[row.name]
