"""The table of formats: one row says all that the rest of the program needs to know about a way to store weights.

Rows are plain data, so that they can be named without loading torch. The arithmetic and the layout of a row are in the
codec module of its family (`ggml`, `int8`, `bnb`, ...), found by name when they are first needed. A new format is a row
here and a codec there; nothing else changes. Which tensor of a model gets which format is another matter: see `recipe`.

Every tensor is seen as `rows` x `columns`: a 1-D tensor is one row, a convolution kernel flattens all but its first
axis. A format cuts it into parts. 2-D parts are cut by rows, so some rows can be read alone; any other part is shared.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from .inputs import Inputs

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
    "mxfp4": (39, 32, 17), "nvfp4_ggml": (40, 64, 36),
}  # fmt: skip
GGML_NAMES = {number: name for name, (number, _, _) in GGML_TYPES.items()}

EFFORTS = ("fast", "reference", "best")

Layout = dict[str, tuple[str, tuple[int, ...]]]  # part suffix -> (dtype, shape)
Shapes = dict[str, tuple[int, ...]]
Options = Mapping[str, Any]
Parts = dict[str, "Tensor"]


class Codec:
    """The arithmetic of a format, on whole rows. Parts with two axes are cut by rows, all others are shared."""

    names: ClassVar[Mapping[str, str]] = {}  # suffix -> leaf in the file, where it is not "weight" + suffix

    def options(self, columns: int) -> Options:
        """What a tensor with rows of this length is written with; the other functions take it back."""
        return {}

    def at_row(self, options: Options, row: int) -> Options:
        """The options of parts that begin at this row of what they were."""
        return options

    def layout(self, rows: int, columns: int, options: Options) -> Layout:
        """Part suffix -> dtype and shape, for a tensor of rows x columns."""
        raise NotImplementedError

    def stored(self, rows: int, columns: int, options: Options) -> Shapes:
        """The shapes that other programs expect in the file: the same bytes."""
        return {suffix: shape for suffix, (_, shape) in self.layout(rows, columns, options).items()}

    def marker(self, options: Options) -> dict[str, Any]:
        """What ComfyUI's `<layer>.comfy_quant` says of a tensor with these options."""
        raise NotImplementedError

    def quantize(self, x: Tensor, options: Options, effort: str = "reference", inputs: Inputs | None = None) -> Parts:
        """x: [rows, columns] float32 -> one tensor per part, typed and shaped as the layout says.

        inputs: what x will be multiplied by, as far as it is known; a format without a choice takes no notice."""
        raise NotImplementedError

    def dequantize(self, parts: Parts, columns: int, options: Options) -> Tensor:
        """The inverse: [rows, columns] float32. There may be rows of padding after the last."""
        raise NotImplementedError


@dataclass(frozen=True)
class Format:
    """One row of the table."""

    name: str
    family: str  # the module with the codec
    container: str  # "gguf", "comfy", "bnb", "quanto", "torchao", or "any"
    summary: str = ""
    dtype: str = "U8"  # of the main part
    block: int = 1  # columns must be a multiple of this
    row_group: int = 1  # rows are read in multiples of this; 0: only all together
    per_tensor: bool = False  # to quantize some rows, all must be known
    writable: bool = False

    def fits(self, columns: int) -> bool:
        return columns % self.block == 0

    def layout(self, rows: int, columns: int, options: Options | None = None) -> Layout:
        """Part suffix -> dtype and shape, for a tensor of rows x columns."""
        return self.codec.layout(rows, columns, self.codec.options(columns) if options is None else options)

    def nbytes(self, rows: int, columns: int, options: Options | None = None) -> int:
        """Bytes of all parts together."""
        layout = self.layout(rows, columns, options).values()
        return sum(DTYPE_BYTES[dtype] * math.prod(shape) for dtype, shape in layout)

    def bits_per_weight(self, columns: int = 3840) -> float:
        """Bits per weight of a square tensor, scales included."""
        return self.nbytes(columns, columns) * 8 / columns**2

    @property
    def calibrated(self) -> bool:
        """Whether it is quantized better where it is known what weights are multiplied by."""
        return self.writable and (self.family == "ggml" or self.name in ("int8", "int4", "nf4"))

    def part_name(self, tensor: str, suffix: str) -> str:
        """What a part is called in the file. tensor: "<layer>.weight"."""
        leaf = self.codec.names.get(suffix)
        return tensor + suffix if leaf is None else tensor.removesuffix("weight") + leaf

    @cached_property
    def codec(self) -> Codec:
        return importlib.import_module(f".{self.family}", __package__).codec(self)

    @property
    def lossy(self) -> bool:
        return self.family != "plain" or self.dtype.startswith("F8")


def _plain(name: str, dtype: str, summary: str) -> Format:
    return Format(name, "plain", "any", summary, dtype=dtype, writable=True)


def _ggml(name: str, writable: bool = False) -> Format:
    return Format(name, "ggml", "gguf", f"ggml {name}", block=GGML_TYPES[name][1], writable=writable)


_ROWS = (
    _plain("f32", "F32", "as on the Hub"),
    _plain("bf16", "BF16", "half the size of f32, same range"),
    _plain("f16", "F16", "half the size of f32, for GPUs without bf16"),
    _plain("f64", "F64", "never needed, but legal"),
    _plain("f8_e4m3", "F8_E4M3", "a plain cast to 8-bit float"),
    _plain("f8_e5m2", "F8_E5M2", "a plain cast to 8-bit float"),
    *(
        _ggml(name, writable=True)
        for name in ("q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "iq4_nl", "iq4_xs", "q3_k", "q2_k")
    ),
    Format("int8", "int8", "comfy", "8-bit integers per row, Hadamard-rotated", dtype="I8", writable=True),
    Format("int4", "comfy_int", "comfy", "4-bit codes that expand to rotated int8", block=16, writable=True),
    Format("convrot_w4a4", "comfy_int", "comfy", "4-bit integers per row, rotated"),
    Format("fp8", "comfy_float", "comfy", "8-bit floats with one scale", per_tensor=True, writable=True),
    Format("fp8_e5m2", "comfy_float", "comfy", "the same with more range and less precision"),
    Format("mxfp8", "comfy_float", "comfy", "8-bit floats, a power of two for 32", row_group=128),
    Format("nvfp4", "comfy_float", "comfy", "4-bit floats, an 8-bit float for 16", row_group=128),
    Format("nf4", "bnb", "bnb", "4 bits at the quantiles of a Gaussian", block=64, per_tensor=True, writable=True),
    Format("fp4", "bnb", "bnb", "4-bit floats in blocks of 64"),
    Format("bnb-int8", "bnb", "bnb", "8-bit integers per row", writable=True),
    Format("qint8", "quanto", "quanto", "8-bit integers per row", writable=True),
    Format("qfloat8", "quanto", "quanto", "8-bit floats per row", writable=True),
    Format("qint4", "quanto", "quanto", "4 bits with a shift", block=32, row_group=0, per_tensor=True, writable=True),
    Format("qint2", "quanto", "quanto", "2 bits with a shift", row_group=0),
    Format("torchao-int8", "torchao", "torchao", "8-bit integers"),
    Format("torchao-fp8", "torchao", "torchao", "8-bit floats"),
)  # fmt: skip
FORMATS: dict[str, Format] = {row.name: row for row in _ROWS}
FORMATS |= {name: _ggml(name) for name in GGML_TYPES if name not in FORMATS}
PLAIN_BY_DTYPE = {row.dtype: row for row in FORMATS.values() if row.family == "plain"}
