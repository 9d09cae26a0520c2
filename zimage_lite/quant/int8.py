"""ComfyUI's `int8_tensorwise` with one scale per row, rotated by ConvRot: W H stored, x H computed at run time.

options: {"group": columns rotated together, 0 for none}. The marker that goes beside each tensor in the file tells
other programs the same. Scale and rounding as comfy-kitchen's: s = max|w| / 127, codes round half to even. Where it is
known what rows are multiplied by, both are chosen by that: H as it is after the rotation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from zimage_kernels import hadamard_rotate

from .compensate import compensated
from .formats import Codec, Format, Layout, Options, Parts
from .inputs import Inputs
from .loops import loops

MARKER_FORMAT = "int8_tensorwise"
_GROUPS = (256, 64, 16)
_FACTORS = tuple(1 - 0.025 * step for step in range(13))  # of the scale that lays a row's largest on 127


def rotation_group(columns: int) -> int:
    """The largest group that divides the row, or 0: 256 for every linear of the true model."""
    return next((group for group in _GROUPS if columns % group == 0), 0)


class Int8Codec(Codec):
    def options(self, columns: int) -> Options:
        return {"group": rotation_group(columns)}

    def layout(self, rows: int, columns: int, options: Options) -> Layout:
        return {"": ("I8", (rows, columns)), "_scale": ("F32", (rows, 1))}

    def marker(self, options: Options) -> dict[str, Any]:
        """What `<layer>.comfy_quant` says of a tensor with these options."""
        rotation = {"convrot": True, "convrot_groupsize": options["group"]} if options["group"] else {}
        return {"format": MARKER_FORMAT, **rotation}

    def quantize(self, x: Tensor, options: Options, effort: str = "reference", inputs: Inputs | None = None) -> Parts:
        if inputs is not None:
            return _weighed(x, options["group"], effort, inputs)
        if x.device.type == "cpu" and options["group"] != 4:
            codes, scale = loops("rows_cpu").pack_int8(x, options["group"])
            return {"": codes, "_scale": scale}
        if options["group"]:
            x = hadamard_rotate(x, options["group"])
        scale = x.abs().amax(1, keepdim=True).div_(127).clamp_(min=1e-30)
        codes = (x / scale).round_().clamp_(-128, 127)
        return {"": codes.char(), "_scale": scale}

    def dequantize(self, parts: Parts, columns: int, options: Options) -> Tensor:
        wide = parts[""].float() * parts["_scale"]
        return hadamard_rotate(wide, options["group"]) if options["group"] else wide

    def linear(self, x: Tensor, parts: Parts, options: Options) -> Tensor:
        """Rotates x (few rows) instead of W (thousands), and scales the product instead of the weight.

        Codes are divided by 2048 first, which is exact, so that float16 sums stay as small as those of the weights
        themselves, the largest of which are about 1/16 in a row of the true model.
        """
        if options["group"]:
            x = hadamard_rotate(x, options["group"])
        return F.linear(x, self._fractions(parts, x)) * self._scales(parts, x)

    def linear_back(self, dy: Tensor, parts: Parts, options: Options) -> Tensor:
        """dy @ W = ((dy s) codes) H: scales the few rows of dy, and rotates those of the result."""
        dx = (dy * self._scales(parts, dy)) @ self._fractions(parts, dy)
        return hadamard_rotate(dx, options["group"]) if options["group"] else dx

    def _fractions(self, parts: Parts, x: Tensor) -> Tensor:
        return parts[""].to(x.dtype).div_(2048)

    def _scales(self, parts: Parts, x: Tensor) -> Tensor:
        return (parts["_scale"].squeeze(1) * 2048).to(x.dtype)


class _Rows:
    """Columns of as many rows as `scale` has: integers times it. values: [columns, rows] float32."""

    def __init__(self, scale: Tensor, columns: int) -> None:
        self.scale, self.values = scale, scale.new_zeros(columns, len(scale))

    def __call__(self, column: int, x: Tensor) -> Tensor:
        torch.div(x, self.scale, out=self.values[column]).round_().clamp_(-127, 127).mul_(self.scale)
        return self.values[column]

    def sub_blocks(self) -> list[slice]:
        return []  # the scale is that of the whole row

    def refit(self, sub: int, pull: Tensor, hessian: Tensor) -> Tensor:
        raise NotImplementedError


def _weighed(x: Tensor, group: int, effort: str, inputs: Inputs) -> Parts:
    if group:
        x, inputs = hadamard_rotate(x, group), inputs.rotated(group)
    scale = _searched(x, inputs.squares.to(x.device))
    wide = x
    if effort == "best" and inputs.hessian is not None:
        width = inputs.hessian.shape[1]
        blocks = compensated(x, inputs, width, lambda *_: _Rows(scale.flatten(), width))
        wide = torch.cat([block.values for block in blocks]).t()
    return {"": (wide / scale).round_().clamp_(-127, 127).char().contiguous(), "_scale": scale}


def _searched(x: Tensor, counted: Tensor) -> Tensor:
    """[rows, 1]: the scale of each row to the least weighted error."""
    largest = x.abs().amax(1, keepdim=True).div_(127).clamp_(min=1e-30)
    best, least = largest, torch.full_like(largest, torch.inf)
    for factor in _FACTORS:
        scale = largest * factor
        gap = (x / scale).round_().clamp_(-127, 127).mul_(scale).sub_(x)
        error = (gap.square_() @ counted).unsqueeze(1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def codec(row: Format) -> Int8Codec:
    return Int8Codec()
