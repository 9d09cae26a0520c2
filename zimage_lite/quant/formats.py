"""The table of formats: one row says all that the rest of the program needs to know about a way to store weights.

Rows are plain data, so that the command line can name them without loading torch. The arithmetic of a row is in the
codec module of its family (`plain`, `ggml`, `int8`), found by name when it is first needed. A new format is a row here
and a codec there; nothing else changes.

Every tensor is seen as `rows` x `columns`: a 1-D tensor is one row, a convolution kernel flattens all but its first
axis. A format cuts each row into parts, and a part's bytes for some rows depend on those rows alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip

# ggml type -> (id, elements per block, bytes per block), from ggml 0.15. Plain types are blocks of one.
GGML_TYPES = {
    "f32": (0, 1, 4), "f16": (1, 1, 2), "bf16": (30, 1, 2), "f64": (28, 1, 8),
    "q4_0": (2, 32, 18), "q4_1": (3, 32, 20), "q5_0": (6, 32, 22), "q5_1": (7, 32, 24), "q8_0": (8, 32, 34),
    "q2_k": (10, 256, 84), "q3_k": (11, 256, 110), "q4_k": (12, 256, 144), "q5_k": (13, 256, 176),
    "q6_k": (14, 256, 210), "iq2_xxs": (16, 256, 66), "iq2_xs": (17, 256, 74), "iq3_xxs": (18, 256, 98),
    "iq1_s": (19, 256, 50), "iq4_nl": (20, 32, 18), "iq3_s": (21, 256, 110), "iq2_s": (22, 256, 82),
    "iq4_xs": (23, 256, 136), "iq1_m": (29, 256, 56), "tq1_0": (34, 256, 54), "tq2_0": (35, 256, 66),
    "mxfp4": (39, 32, 17), "nvfp4": (40, 64, 36),
}  # fmt: skip
GGML_NAMES = {number: name for name, (number, _, _) in GGML_TYPES.items()}

Layout = dict[str, tuple[str, tuple[int, int]]]  # part suffix -> (dtype, [rows, columns])
Parts = dict[str, "Tensor"]


class Codec(Protocol):
    """The arithmetic of a format, on whole rows."""

    def options(self, columns: int) -> Mapping[str, Any]:
        """What a tensor with rows of this length is written with; `quantize` and `dequantize` take it back."""

    def quantize(self, x: Tensor, options: Mapping[str, Any]) -> Parts:
        """x: [rows, columns] float32 -> one tensor per part, typed and shaped as the format's layout says."""

    def dequantize(self, parts: Parts, columns: int, options: Mapping[str, Any]) -> Tensor:
        """The inverse: [rows, columns] float32."""


@dataclass(frozen=True)
class Format:
    """One row of the table."""

    name: str
    family: str  # the module with the codec
    container: str  # "gguf", "safetensors" (ComfyUI's names and markers), or "any"
    summary: str
    dtype: str = "U8"  # of the main part
    block: int = 1  # columns must be a multiple of this
    block_bytes: int = 0
    row_bytes: int = 0  # of scales beside the main part, per row
    writable: bool = False
    target: bool = False  # offered as `quantize --to`
    read_by: tuple[str, ...] = field(default=())

    def fits(self, columns: int) -> bool:
        return columns % self.block == 0

    def layout(self, rows: int, columns: int) -> Layout:
        """Part suffix -> dtype and shape, for a tensor of rows x columns."""
        if self.family == "ggml":
            return {"": ("U8", (rows, columns // self.block * self.block_bytes))}
        parts: Layout = {"": (self.dtype, (rows, columns))}
        if self.row_bytes:
            parts["_scale"] = ("F32", (rows, 1))
        return parts

    def bits_per_weight(self, columns: int = 3840) -> float:
        """Bits per weight, scales included, for rows of this length."""
        total = sum(DTYPE_BYTES[dtype] * shape[1] for dtype, shape in self.layout(1, columns).values())
        return total * 8 / columns

    @cached_property
    def codec(self) -> Codec:
        return importlib.import_module(f".{self.family}", __package__).codec(self)

    @property
    def lossy(self) -> bool:
        return self.family != "plain"


def _plain(name: str, dtype: str, summary: str, **kwargs: Any) -> Format:
    return Format(name, "plain", "any", summary, dtype=dtype, block_bytes=DTYPE_BYTES[dtype], writable=True, **kwargs)


def _ggml(name: str, summary: str = "", **kwargs: Any) -> Format:
    _, block, block_bytes = GGML_TYPES[name]
    return Format(name, "ggml", "gguf", summary or f"ggml {name}", block=block, block_bytes=block_bytes, **kwargs)


_GGUF_READERS = ("ComfyUI-GGUF", "stable-diffusion.cpp", "diffusers (single file)")
_WRITTEN = {"writable": True, "target": True, "read_by": _GGUF_READERS}

_ROWS = (
    _plain("f32", "F32", "as on the Hub"),
    _plain("bf16", "BF16", "half the size of f32, same range", target=True, read_by=_GGUF_READERS),
    _plain("f16", "F16", "half the size of f32, for GPUs without bf16", target=True, read_by=_GGUF_READERS),
    _plain("f64", "F64", "never needed, but legal"),
    _plain("f8_e4m3", "F8_E4M3", "a plain cast to 8-bit float"),
    _plain("f8_e5m2", "F8_E5M2", "a plain cast to 8-bit float"),
    _ggml("q8_0", "8 bits in blocks of 32: the closest to bf16", **_WRITTEN),
    _ggml("q4_0", "4 bits in blocks of 32, feed-forward w2 in q4_1", **_WRITTEN),
    _ggml("q4_1", "4 bits in blocks of 32 with a minimum", writable=True, read_by=_GGUF_READERS),
    Format(
        "int8", "int8", "safetensors", "8-bit integers per row, Hadamard-rotated: for 8-bit matrix units",
        dtype="I8", block_bytes=1, row_bytes=4, writable=True, target=True,
        read_by=("ComfyUI 0.27", "stable-diffusion.cpp"),
    ),
)  # fmt: skip
FORMATS: dict[str, Format] = {row.name: row for row in _ROWS}
FORMATS |= {name: _ggml(name) for name in GGML_TYPES if name not in FORMATS}
PLAIN_BY_DTYPE = {row.dtype: row for row in FORMATS.values() if row.family == "plain"}
TARGETS = tuple(row.name for row in FORMATS.values() if row.target)


def target_format(name: str, flag: str = "--to", also: tuple[str, ...] = ()) -> Format:
    """The row that `quantize` can write, or a UserError that lists them all. also: what else the flag takes."""
    row = FORMATS.get(name.lower())
    if row is None or not row.target:
        known = ", ".join(TARGETS + also)
        raise UserError(f"{flag}: not a format that can be written", got=repr(name), expected=known)
    return row
