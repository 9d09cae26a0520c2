"""bitsandbytes' formats, as diffusers and transformers save them: `nf4`, `fp4` and `bnb-int8`.

4 bits: 64 weights share a scale, their largest |w|; a code names one of 16 levels between -1 and 1. The first of two
weights has the high nibble. With double quantization the scales are bytes themselves: codes of a 256-level map, times
one float32 for 256 of them, plus one offset. That offset and the sizes are JSON text in a part of their own.

    w = quant_map[code] * absmax             absmax = nested_quant_map[byte] * nested_absmax + nested_offset

Blocks run over the flat tensor. If 64 divides the row, codes and absmax are cut by rows as well; a nested_absmax is for
256 blocks wherever they lie, so options["first_row"] says where the parts begin.

Where it is known what rows are multiplied by, scales and codes are chosen by that; they mean the same to whoever reads.

8 bits: w = code * SCB / 127, SCB the row's largest |w|. Source: bitsandbytes 0.50.2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import FileFormatError
from ..units import round_up
from .compensate import compensated
from .formats import Codec, Format, Layout, Options, Parts, Shapes
from .inputs import Inputs
from .levels import Free, Levels, Scales, nearest, searched
from .pieces import by_pieces, count_below, pack_nibbles, unpack_nibbles, widen

BLOCK, NESTED_BLOCK = 64, 256
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # that bitsandbytes knows
PIECE_COMPENSATED = 2**22  # weights: fewer would be columns too short to be worth a step of Python's
_OFFSET = ".nested_offset"  # while a tensor is quantized
STATE_BYTES = 256  # the JSON is padded with spaces, so that its size is known before the offset is

# Quantiles of a normal distribution, with a level at 0. QLoRA, arXiv 2305.14314.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_SIZES = (0.0, 0.005208333333, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
_LEVELS = {"nf4": _NF4, "fp4": (*_FP4_SIZES, *(-size for size in _FP4_SIZES))}


def nested_map() -> Tensor:
    """[256] float32: bitsandbytes' dynamic map. 2**e levels between each 10**(e-7) and 10**(e-6), either sign; 0; 1."""
    levels = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1)
        means = 10 ** (exponent - 6) * ((bounds[:-1] + bounds[1:]) / 2)
        levels += [means, -means]
    return torch.cat(levels).sort().values


def read_state(text: bytes, where: str) -> dict[str, Any]:
    """The JSON part -> options, and the tensor's "shape". Raises FileFormatError."""
    try:
        state = json.loads(text)
        kind, shape = str(state["quant_type"]), tuple(int(size) for size in state["shape"])
        options = {"quant_type": kind, "blocksize": int(state["blocksize"]), "dtype": str(state["dtype"])}
        if "nested_offset" in state:
            options |= {"offset": float(state["nested_offset"]), "nested_blocksize": int(state["nested_blocksize"])}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise FileFormatError(f"{where} is not the JSON that bitsandbytes writes") from error
    sizes = (options["blocksize"], options.get("nested_blocksize", NESTED_BLOCK))
    if kind not in _LEVELS or any(size not in BLOCK_SIZES for size in sizes):
        raise FileFormatError(where, got=(kind, *sizes), expected=f"nf4 or fp4, sizes of {BLOCK_SIZES}")
    return {**options, "shape": shape}


@dataclass(frozen=True)
class FourBitCodec(Codec):
    """options: {"blocksize", "dtype": of the model, "nested_blocksize": 0 without double quantization, "offset"}.

    While writing there is no "offset"; `quantize` puts it into the JSON, and `dequantize` finds it there.
    """

    quant_type: str
    names: ClassVar[Mapping[str, str]] = {}

    @property
    def state_part(self) -> str:
        return f".quant_state.bitsandbytes__{self.quant_type}"

    def options(self, columns: int) -> Options:
        return {"blocksize": BLOCK, "nested_blocksize": NESTED_BLOCK, "dtype": "bfloat16"}

    def at_row(self, options: Options, row: int) -> Options:
        return {**options, "first_row": options.get("first_row", 0) + row}

    def layout(self, rows: int, columns: int, options: Options) -> Layout:
        nested, blocks = options.get("nested_blocksize", 0), round_up(rows * columns, options["blocksize"])
        blocks //= options["blocksize"]
        by_rows = columns % options["blocksize"] == 0
        layout: Layout = {
            "": ("U8", (rows, columns // 2) if by_rows else (-(-rows * columns // 2),)),
            ".absmax": ("U8" if nested else "F32", (rows, blocks // rows) if by_rows else (blocks,)),
            ".quant_map": ("F32", (16,)),
            self.state_part: ("U8", (STATE_BYTES,)),
        }
        if nested:
            layout[".nested_absmax"] = ("F32", (-(-blocks // nested),))
            layout[".nested_quant_map"] = ("F32", (256,))
        return layout

    def stored(self, rows: int, columns: int, options: Options) -> Shapes:
        shapes = super().stored(rows, columns, options)
        blocks = round_up(rows * columns, options["blocksize"]) // options["blocksize"]
        return shapes | {"": (-(-rows * columns // 2), 1), ".absmax": (blocks,)}

    def quantize(self, x: Tensor, options: Options, effort: str = "reference", inputs: Inputs | None = None) -> Parts:
        """The bytes that bitsandbytes makes of the same float32. Rows must be whole blocks."""
        rows, columns = x.shape
        size, nested = options["blocksize"], options.get("nested_blocksize", 0)
        levels = torch.tensor(_LEVELS[self.quant_type], device=x.device)
        ordered, order = levels.sort(stable=True)
        bounds = (ordered[1:] + ordered[:-1]) / 2
        if inputs is not None and self.quant_type == "nf4":
            return self._written(_weighed(x, levels, options, effort, inputs), x, options)

        def pack(piece: slice) -> Parts:
            blocks = x[piece].reshape(-1, size)
            absmax = blocks.abs().amax(1, keepdim=True)
            codes = count_below((blocks * (1.0 / absmax.clamp(min=1e-38))).clamp_(-1, 1), bounds)
            if self.quant_type == "fp4":
                codes = order.byte().index_select(0, codes.flatten().int())
            packed = pack_nibbles(codes.view(-1, columns), high_first=True)
            return {"": packed, ".absmax": absmax.view(-1, columns // size)}

        parts = by_pieces(rows, columns, pack)
        if nested:
            parts |= _nest(parts[".absmax"], nested)
        return self._written(parts, x, options)

    def _written(self, parts: Parts, x: Tensor, options: Options) -> Parts:
        """With what readers want to know beside it. parts: with the offset of double quantization, if there is one, as
        a tensor."""
        kind, size, shape = self.quant_type, options["blocksize"], list(x.shape)
        state = {"quant_type": kind, "blocksize": size, "dtype": options["dtype"], "shape": shape}
        if _OFFSET in parts:
            nested, offset = options["nested_blocksize"], parts.pop(_OFFSET).item()
            state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": offset}
        text, levels = json.dumps(state).encode().ljust(STATE_BYTES), torch.tensor(_LEVELS[kind], device=x.device)
        return {**parts, ".quant_map": levels, self.state_part: torch.tensor(list(text), dtype=torch.uint8)}

    def dequantize(self, parts: Parts, columns: int, options: Options) -> Tensor:
        size = options["blocksize"]
        levels = parts[".quant_map"].float()
        packed = parts[""].reshape(-1, 1).view(torch.uint8).flatten()  # whatever the storage dtype
        absmax = self._absmax(parts, columns, options)
        if columns % size:  # blocks run across rows, so the parts are the whole tensor's
            wide = unpack_nibbles(packed.view(1, -1), levels, high_first=True).flatten()
            rows = wide.numel() // columns
            return (wide * absmax.repeat_interleave(size)[: wide.numel()])[: rows * columns].view(rows, columns)
        packed, absmax = packed.view(-1, columns // 2), absmax.view(-1, columns // size, 1)

        def unpack(piece: slice) -> Tensor:
            wide = unpack_nibbles(packed[piece], levels, high_first=True).view(-1, columns // size, size)
            return wide.mul_(absmax[piece]).view(-1, columns)

        return widen(packed.shape[0], columns, unpack)

    def _absmax(self, parts: Parts, columns: int, options: Options) -> Tensor:
        """[blocks] float32"""
        codes = parts[".absmax"].flatten()
        if ".nested_absmax" not in parts:
            return codes.float()
        if "offset" not in options:
            options = {**options, **read_state(bytes(parts[self.state_part].tolist()), self.state_part)}
        nested, first = options["nested_blocksize"], options.get("first_row", 0) * columns // options["blocksize"]
        scales = parts[".nested_absmax"].repeat_interleave(nested)[first : first + codes.numel()]
        return parts[".nested_quant_map"].index_select(0, codes.int()).mul_(scales).add_(options["offset"])


class _NestedScales:
    """What blocks can be multiplied by with double quantization: a number of the map times one of theirs, and more than
    0. Stored as indices, int64. nested: [blocks] float32, the scales of scales."""

    def __init__(self, levels: Tensor, nested: Tensor, offset: Tensor) -> None:
        self.table, self.nested, self.offset, self.map = levels, nested, offset, nested_map().to(levels.device)
        self.borders = (self.map[1:] + self.map[:-1]) / 2
        self.least = torch.searchsorted(self.map, -offset / nested.clamp(min=1e-38), right=True).clamp(max=255)

    def near(self, scale: Tensor) -> list[Tensor]:
        stored = torch.bucketize((scale - self.offset) / self.nested.clamp(min=1e-38), self.borders)
        return [torch.maximum(stored + step, self.least).clamp_(max=255) for step in (0, -1, 1)]

    def value(self, stored: Tensor) -> Tensor:
        return self.map[stored] * self.nested + self.offset

    def levels(self, stored: Tensor) -> Tensor:
        return self.table.unsqueeze(1) * self.value(stored)


def _weighed(x: Tensor, levels: Tensor, options: Options, effort: str, inputs: Inputs) -> Parts:
    """Scales are searched as if any could be stored; with double quantization those that are near them in what can be
    stored then. `best` starts from these once more, in turn from left to right."""
    rows, columns = x.shape
    size, nested = options["blocksize"], options.get("nested_blocksize", 0)
    counted, free = inputs.squares.to(x.device).view(-1, size).t(), Free(levels)

    def columns_of(piece: slice) -> tuple[Tensor, Tensor]:
        """[size, blocks] of weights, and of what their errors count"""
        own = x[piece].reshape(-1, size).t().contiguous()
        return own, counted.repeat(1, own.shape[1] // counted.shape[1])

    def search(piece: slice) -> Parts:
        return {".absmax": searched(free, *columns_of(piece)).view(-1, columns // size)}

    parts = by_pieces(rows, columns, search)
    if nested:
        parts = _nest(parts[".absmax"], nested)
    place = torch.arange(rows * (columns // size), device=x.device).view(rows, -1)

    def scales_of(blocks: Tensor) -> Scales:
        return _NestedScales(levels, parts[".nested_absmax"][blocks // nested], parts[_OFFSET]) if nested else free

    def pack(piece: slice) -> Parts:
        own, weights = columns_of(piece)
        scales = scales_of(place[piece].flatten())
        stored = searched(scales, own, weights)
        return _packed_4bit(
            nearest(scales.levels(stored), own).t().reshape(-1, columns), stored.view(-1, columns // size)
        )

    def compensate(piece: slice) -> Parts:
        def fit(number: int, block: Tensor, counted: Tensor) -> Levels:
            scales = scales_of(place[piece, number])
            return Levels(scales, size, searched(scales, block.t().contiguous(), counted.unsqueeze(1)))

        blocks = compensated(x[piece], inputs, size, fit)
        codes = torch.cat([block.codes for block in blocks]).t().contiguous()
        return _packed_4bit(codes, torch.stack([block.stored for block in blocks], dim=1))

    if effort == "best" and inputs.hessian is not None:
        return parts | by_pieces(rows, columns, compensate, PIECE_COMPENSATED)
    return parts | by_pieces(rows, columns, pack)


def _packed_4bit(codes: Tensor, stored: Tensor) -> Parts:
    """codes: [rows, columns] uint8; stored: [rows, blocks], scales or the codes of them"""
    return {
        "": pack_nibbles(codes, high_first=True),
        ".absmax": stored if stored.is_floating_point() else stored.byte(),
    }


def _nest(absmax: Tensor, size: int) -> Parts:
    """Double quantization of the scales: the parts, and the offset."""
    levels = nested_map().to(absmax.device)
    offset = absmax.flatten().mean()
    blocks = (absmax.flatten() - offset).split(size)
    scales = torch.stack([block.abs().amax() for block in blocks])
    scaled = [block * (1.0 / scale.clamp(min=1e-38)) for block, scale in zip(blocks, scales, strict=True)]
    codes = torch.bucketize(torch.cat(scaled), (levels[1:] + levels[:-1]) / 2, out_int32=True).byte()
    parts = {".absmax": codes.view(absmax.shape), ".nested_absmax": scales, ".nested_quant_map": levels}
    return parts | {_OFFSET: offset}


class EightBitCodec(Codec):
    names: ClassVar[Mapping[str, str]] = {"": "weight", "_scb": "SCB", "_format": "weight_format"}

    def layout(self, rows: int, columns: int, options: Options) -> Layout:
        return {"": ("I8", (rows, columns)), "_scb": ("F32", (rows, 1)), "_format": ("U8", ())}

    def stored(self, rows: int, columns: int, options: Options) -> Shapes:
        return {"": (rows, columns), "_scb": (rows,), "_format": ()}

    def quantize(self, x: Tensor, options: Options, effort: str = "reference", inputs: Inputs | None = None) -> Parts:
        """bitsandbytes rounds to float16 first, which these codes do without."""

        def pack(piece: slice) -> Parts:
            scale = x[piece].abs().amax(1, keepdim=True)
            codes = (x[piece] * (127.0 / scale.clamp(min=1e-30))).round_().clamp_(-127, 127)
            return {"": codes.char(), "_scb": scale}

        row_major = torch.zeros((), dtype=torch.uint8, device=x.device)
        return {**by_pieces(x.shape[0], x.shape[1], pack), "_format": row_major}

    def dequantize(self, parts: Parts, columns: int, options: Options) -> Tensor:
        codes, scale = parts[""], parts["_scb"].float().reshape(-1, 1) / 127
        return widen(codes.shape[0], columns, lambda piece: codes[piece] * scale[piece])


CODECS: dict[str, Codec] = {
    "nf4": FourBitCodec("nf4"),
    "fp4": FourBitCodec("fp4"),
    "bnb-int8": EightBitCodec(),
}


def codec(row: Format) -> Codec:
    return CODECS[row.name]
