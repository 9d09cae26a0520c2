"""optimum-quanto's formats: `qint8`, `qfloat8` (e4m3), `qint4` and `qint2`.

8 bits: w = data * scale, one scale per row. 4 and 2 bits: w = scale * code - shift, for 128 weights at a time (96, 64
or 32 where 128 does not divide the row, a whole row where none does), seen as a matrix of one group per row. Packing
cuts that matrix into 2 or 4 stacks of rows; stack i has bits i * 4 or i * 2 of the bytes. So one byte holds weights of
far-apart rows, and packed codes cannot be cut by rows of the tensor: they are read whole.

Scales have the model's dtype, and quanto computes in it. "reference" makes quanto's bytes; "best" keeps its scales, but
rounds to the nearest code. Source: optimum-quanto 0.2.7.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .formats import Codec, Format, Layout, Options, Parts
from .inputs import Inputs
from .pieces import by_pieces, from_float8, row_pieces, widen
from .tensor import TORCH_DTYPES

# Quantized layers have two more scalars, for activations that nobody quantized.
_MODULE_SCALES = {"_input_scale": "input_scale", "_output_scale": "output_scale"}


def group_of(columns: int) -> int:
    """Weights that share a scale in 4 and 2 bits."""
    group = 128
    if columns > group:
        while columns % group and group > 32:
            group -= 32
        if columns % group == 0:
            return group
    return columns


def _module_scales(dtype: str) -> Parts:
    return {suffix: torch.ones((), dtype=TORCH_DTYPES[dtype]) for suffix in _MODULE_SCALES}


@dataclass(frozen=True)
class ByteCodec(Codec):
    """options: {"dtype": of the scales}"""

    dtype: str
    names: ClassVar[Mapping[str, str]] = {"": "weight._data", **_MODULE_SCALES}

    def options(self, columns: int) -> Options:
        return {"dtype": "BF16"}

    def layout(self, rows: int, columns: int, options: Options) -> Layout:
        scale = options["dtype"]
        layout: Layout = {"": (self.dtype, (rows, columns)), "._scale": (scale, (rows, 1))}
        return layout | dict.fromkeys(_MODULE_SCALES, (scale, ()))

    def quantize(self, x: Tensor, options: Options, effort: str = "reference", inputs: Inputs | None = None) -> Parts:
        stored, model = TORCH_DTYPES[self.dtype], TORCH_DTYPES[options["dtype"]]
        limits = torch.finfo(stored) if stored.is_floating_point else torch.iinfo(stored)

        def cast(piece: slice) -> Parts:
            rows = x[piece].to(model)
            scale = rows.abs().amax(1, keepdim=True) / limits.max
            safe = torch.where(scale == 0, 1.0, scale)
            data = x[piece] / safe.float() if effort == "best" else rows / safe
            data = data if stored.is_floating_point else data.round_()
            return {"": data.clamp_(limits.min, limits.max).to(stored), "._scale": scale}

        return {**by_pieces(x.shape[0], x.shape[1], cast), **_module_scales(options["dtype"])}

    def dequantize(self, parts: Parts, columns: int, options: Options) -> Tensor:
        data, scale = parts[""], parts["._scale"].float().reshape(-1, 1).expand(parts[""].shape[0], 1)
        return widen(data.shape[0], columns, lambda piece: from_float8(data[piece]).mul_(scale[piece]))


@dataclass(frozen=True)
class PackedCodec(Codec):
    """options: {"dtype": of scales and shifts, "group"}. Takes the parts as they are in the file, all rows together."""

    bits: int
    names: ClassVar[Mapping[str, str]] = {"": "weight._data._data", **_MODULE_SCALES}

    def options(self, columns: int) -> Options:
        return {"dtype": "BF16", "group": group_of(columns)}

    def layout(self, rows: int, columns: int, options: Options) -> Layout:
        dtype, group = options["dtype"], options["group"]
        groups = rows * columns // group
        scales = {"._scale": (dtype, (groups, 1)), "._shift": (dtype, (groups, 1))}
        module: Layout = dict.fromkeys(_MODULE_SCALES, (dtype, ()))
        return {"": ("U8", (-(-groups * self.bits // 8), group)), **scales, **module}

    def quantize(self, x: Tensor, options: Options, effort: str = "reference", inputs: Inputs | None = None) -> Parts:
        groups = x.reshape(-1, options["group"])
        model, stack = TORCH_DTYPES[options["dtype"]], -(-len(groups) * self.bits // 8)
        packed = torch.zeros(stack, options["group"], dtype=torch.uint8, device=x.device)
        scale, shift = (torch.empty(len(groups), 1, dtype=model, device=x.device) for _ in range(2))
        for piece in row_pieces(stack, options["group"]):
            for i in range(8 // self.bits):
                part = slice(i * stack + piece.start, min(i * stack + piece.stop, len(groups)))
                if part.start >= part.stop:
                    continue
                codes, scale[part], shift[part] = self._codes(groups[part], model, effort)
                packed[piece][: len(codes)] |= codes << (i * self.bits)
        return {"": packed, "._scale": scale, "._shift": shift, **_module_scales(options["dtype"])}

    def _codes(self, wide: Tensor, model: torch.dtype, effort: str) -> tuple[Tensor, Tensor, Tensor]:
        """[groups, group] float32 -> codes as uint8, scale and shift as [groups, 1] in the model's dtype."""
        x, top = wide.to(model), 2**self.bits - 1
        low, high = torch.aminmax(x, dim=1, keepdim=True)
        scale = (high - low) / top
        safe = torch.where(scale == 0, 1.0, scale)
        codes = (wide - low.float()) / safe.float() if effort == "best" else (x - low) / safe
        return codes.round_().clamp_(0, top).byte(), scale, -low

    def dequantize(self, parts: Parts, columns: int, options: Options) -> Tensor:
        """In the dtype of the scales, as quanto does, so that the weights are the same to the bit."""
        packed, scale, shift = parts[""], parts["._scale"].reshape(-1, 1), parts["._shift"].reshape(-1, 1)
        group, stack = options["group"], packed.numel() // options["group"]
        packed, out = packed.view(stack, group), scale.new_empty(len(scale), group, dtype=torch.float32)
        for i in range(8 // self.bits):
            first = i * stack
            for piece in row_pieces(min(stack, len(scale) - first), group):
                part = slice(first + piece.start, first + piece.stop)
                codes = (packed[piece] >> (i * self.bits)) & (2**self.bits - 1)
                out[part] = (codes * scale[part]).sub_(shift[part])
        return out.view(-1, columns)


CODECS: dict[str, Codec] = {
    "qint8": ByteCodec("I8"),
    "qfloat8": ByteCodec("F8_E4M3"),
    "qint4": PackedCodec(4),
    "qint2": PackedCodec(2),
}


def codec(row: Format) -> Codec:
    return CODECS[row.name]
