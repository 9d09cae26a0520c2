"""ComfyUI's `int8_tensorwise` with one scale per row, rotated by ConvRot: W H stored, x H computed at run time.

options: {"group": columns rotated together, 0 for none}. The marker that goes beside each tensor in the file tells
other programs the same. Scale and rounding as comfy-kitchen's: s = max|w| / 127, codes round half to even.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from zimage_kernels import hadamard_rotate

from ..errors import FileFormatError
from .formats import Format, Parts

MARKER_FORMAT = "int8_tensorwise"
_GROUPS = (256, 64, 16)


def rotation_group(columns: int) -> int:
    """The largest group that divides the row, or 0: 256 for every linear of the true model."""
    return next((group for group in _GROUPS if columns % group == 0), 0)


def to_marker(options: Mapping[str, Any]) -> dict[str, Any]:
    """What `<layer>.comfy_quant` says of a tensor with these options."""
    rotation = {"convrot": True, "convrot_groupsize": options["group"]} if options["group"] else {}
    return {"format": MARKER_FORMAT, **rotation}


def from_marker(marker: Mapping[str, Any], columns: int, where: str) -> dict[str, Any]:
    """The inverse of `to_marker`; options may also be nested in "params". Raises FileFormatError."""
    nested = marker.get("params")
    fields = {**marker, **nested} if isinstance(nested, dict) else marker
    if not fields.get("convrot"):
        return {"group": 0}
    group = fields.get("convrot_groupsize", 256)
    powers_of_4 = [4**i for i in range(1, 7)]
    if not isinstance(group, int) or group not in powers_of_4 or columns % group:
        raise FileFormatError(f"{where}: convrot_groupsize", got=group, expected=f"a power of 4 that divides {columns}")
    return {"group": group}


class Int8Codec:
    def options(self, columns: int) -> Mapping[str, Any]:
        return {"group": rotation_group(columns)}

    def quantize(self, x: Tensor, options: Mapping[str, Any]) -> Parts:
        if options["group"]:
            x = hadamard_rotate(x, options["group"])
        scale = x.abs().amax(1, keepdim=True).div_(127).clamp_(min=1e-30)
        codes = (x / scale).round_().clamp_(-128, 127)
        return {"": codes.char(), "_scale": scale}

    def dequantize(self, parts: Parts, columns: int, options: Mapping[str, Any]) -> Tensor:
        wide = parts[""].float() * parts["_scale"]
        return hadamard_rotate(wide, options["group"]) if options["group"] else wide

    def linear(self, x: Tensor, parts: Parts, options: Mapping[str, Any]) -> Tensor:
        """Rotates x (few rows) instead of W (thousands), and scales the product instead of the weight.

        Codes are divided by 128 first, which is exact, so that float16 sums stay as small as the weight's own scale.
        """
        if options["group"]:
            x = hadamard_rotate(x, options["group"])
        fractions = parts[""].to(x.dtype).div_(128)
        return F.linear(x, fractions) * (parts["_scale"].squeeze(1) * 128).to(x.dtype)


def codec(row: Format) -> Int8Codec:
    return Int8Codec()
