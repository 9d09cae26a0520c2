"""What the markers in ComfyUI's quantized files mean.

Beside each packed weight a file has `<layer>.comfy_quant`, JSON text. It names the format and some of the options; the
rest follows from the arrays. Source: ComfyUI's loader, and comfy-kitchen 0.2.40.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import FileFormatError
from .formats import Options

MARKER_FORMATS = {
    "int8_tensorwise": "int8",
    "asym_w4a8_int8": "int4",
    "convrot_w4a4": "convrot_w4a4",
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8_e5m2",
    "mxfp8": "mxfp8",
    "nvfp4": "nvfp4",
}
COLUMNS_PER_BYTE = {"convrot_w4a4": 2, "nvfp4": 2}  # of the stored matrix; int4 has 2, or 6-bit codes

# option -> its name in the marker, and what it is if the marker does not say
_ROTATION = ("group", "convrot_groupsize", 256)
_OPTIONS = {
    "int8": (_ROTATION,),
    "convrot_w4a4": (_ROTATION,),
    "int4": (_ROTATION, ("scale_group", "group_size", 16)),
}
_POWERS_OF_4 = tuple(4**i for i in range(1, 7))


def from_marker(marker: Mapping[str, Any], columns: int, where: str) -> Options:
    """The options of a tensor with rows of this length; they may also be nested in "params". Raises FileFormatError."""
    nested = marker.get("params")
    fields = {**nested, **marker} if isinstance(nested, dict) else marker
    name = MARKER_FORMATS[marker["format"]]
    options = {}
    for option, spelled, default in _OPTIONS.get(name, ()):
        if name == "int8" and not fields.get("convrot"):
            return {"group": 0}
        value = fields.get(spelled, default)
        allowed = _POWERS_OF_4 if option == "group" else range(4, columns + 1)
        if not isinstance(value, int) or value not in allowed or columns % value:
            kind = "a power of 4 that divides" if option == "group" else "a divisor of"
            raise FileFormatError(f"{where}: {spelled}", got=repr(value)[:60], expected=f"{kind} {columns}")
        options[option] = value
    return options
