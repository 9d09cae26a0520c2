"""Weights of every format, unpacked on the device: to 16 bits for a plain product, or to rotated int8.

A whole weight is unpacked into a scratch buffer before it is used: at 4224 tokens the product takes 20 times as long.
Parts and options are those of the codecs in zimage_lite.quant, which are the definition of each format.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._triton import MATRIX_UNITS, OPTIONS, jit, tl
from .aot import Variant
from .quantize import WIDEST, Int8Rows, check_group, row_tile, to_int8
from .rotation import rotate_in_registers
from .unpack_ggml import GGML_BLOCKS, IQ4_LEVELS, unpack_ggml

KINDS = (*GGML_BLOCKS, "int4", "convrot_w4a4", "nf4", "fp4", "qint4", "qint2", "qint8", "bnb-int8")
Parts = Mapping[str, Tensor]


class _Source(NamedTuple):
    """What the kernel reads. layout: a ggml type, or how the codes lie in other formats; span: columns of a scale;
    stack: rows of packed codes (quanto); group: of the rotation that the stored weight has, 0 for none."""

    layout: str
    packed: Tensor
    scale: Tensor | None = None
    offset: Tensor | None = None
    levels: Tensor | None = None
    span: int = 1
    stack: int = 1
    group: int = 0


def unpacks(kind: str, parts: Parts, options: Mapping[str, Any], columns: int) -> bool:
    """Whether the kernel knows the layout of such a weight. Only the codec knows other kinds, int4 with 6 bits or wide
    scales, blocks of nf4 that run across rows, and rows too long for a program."""
    if kind not in KINDS or columns > WIDEST:
        return False
    if kind == "int4" and (parts[""].shape[1] * 2 != columns or parts["_s_rel"].itemsize != 1):
        return False
    spans = {"int4": "scale_group", "nf4": "blocksize", "fp4": "blocksize"}
    return kind not in spans or _divides(options[spans[kind]], columns)


def dequantize(kind: str, parts: Parts, options: Mapping[str, Any], out: Tensor, first_row: int = 0) -> None:
    """Unpack to out: [rows, columns] bfloat16, float16 or float32, contiguous, on the device of the parts.

    kind: one of KINDS; options: as in a file, with the "offset" of nf4. first_row: where the weight starts in parts
    that hold more than it. ValueError where not `unpacks`.
    """
    source = _source(kind, parts, options, out.shape[1])
    _launch(source, out, None, source.group, first_row)


def requantize(
    kind: str, parts: Parts, options: Mapping[str, Any], out: Int8Rows, group: int, first_row: int = 0
) -> None:
    """Unpack, rotate by groups of `group` and quantize each row, as `quantize_rows` does, without the detour over 16
    bits. int4 and convrot_w4a4 are rotated int8 already, with `group` as stored, and lose nothing."""
    source = _source(kind, parts, options, out.codes.shape[1])
    check_group(out.codes.shape[1], group)
    if source.group not in (0, group):
        raise ValueError(f"rotation group of {kind}: got {group}, expected {source.group} as stored")
    _launch(source, out.codes, out.scale, group, first_row)


def _launch(source: _Source, out: Tensor, row_scale: Tensor | None, group: int, first_row: int) -> None:
    rows, columns = out.shape
    for name, given in (("packed", source.packed), ("unpacked", out)):
        if not given.is_contiguous():
            raise ValueError(f"{name} weight: got strides {given.stride()}, expected contiguous rows")
    elements, block_bytes = GGML_BLOCKS.get(source.layout, (0, 0))
    _dequantize_kernel[(rows,)](
        source.packed, source.scale, source.offset, source.levels, out, row_scale,
        columns, source.stack, first_row,
        source.layout, elements, block_bytes, source.span, group, **row_tile(columns), **OPTIONS,
    )  # fmt: skip


def _source(kind: str, parts: Parts, options: Mapping[str, Any], columns: int) -> _Source:
    packed = parts[""].view(torch.int8 if "int8" in kind else torch.uint8)
    if kind in GGML_BLOCKS:
        return _Source(kind, packed, levels=_iq4_levels(packed.device) if kind.startswith("iq4") else None)
    if kind == "int4":
        scale, span = parts["_s_rel"], _span(kind, options["scale_group"], columns)
        if packed.shape[1] * 2 != columns or scale.itemsize != 1:
            raise ValueError(f"int4: got {packed.shape[1]} bytes for {columns} columns, {scale.dtype} scales")
        scale, levels = scale.view(torch.uint8), parts.get("_codebook")
        return _Source(kind, packed, scale, parts["_s_channel"], levels, span, group=options["group"])
    if kind == "convrot_w4a4":
        return _Source("int4", packed, None, parts["_scale"], group=options["group"])
    if kind in ("nf4", "fp4"):
        span, absmax = _span(kind, options["blocksize"], columns), _absmax(parts, options, columns)
        return _Source("levels", packed.view(-1, columns // 2), absmax, None, parts[".quant_map"], span)
    if kind in ("qint4", "qint2"):
        packed = packed.view(-1, options["group"])
        layout = "quanto4" if kind == "qint4" else "quanto2"
        return _Source(layout, packed, parts["._scale"], parts["._shift"], None, options["group"], len(packed))
    if kind == "qint8":
        return _Source("rows", packed, parts["._scale"])
    if kind == "bnb-int8":
        return _Source("rows", packed, parts["_scb"] / 127)
    raise ValueError(f"format of the weight: got {kind!r}, expected one of {', '.join(KINDS)}")


def _divides(span: int, columns: int) -> bool:
    return columns % span == 0 and span & (span - 1) == 0


def _span(kind: str, span: int, columns: int) -> int:
    if not _divides(span, columns):
        raise ValueError(f"{kind}: got {span} columns to a scale, expected a power of two that divides {columns}")
    return span


@cache
def _iq4_levels(device: torch.device) -> Tensor:
    return torch.tensor(IQ4_LEVELS, dtype=torch.float32, device=device)


def _absmax(parts: Parts, options: Mapping[str, Any], columns: int) -> Tensor:
    """The scales of bitsandbytes' blocks, [blocks] float32, themselves unpacked: a 64th of the weight, so in torch."""
    codes = parts[".absmax"].flatten()
    if ".nested_absmax" not in parts:
        return codes.float()
    first = options.get("first_row", 0) * columns // options["blocksize"]
    at = torch.arange(first, first + len(codes), device=codes.device) // options["nested_blocksize"]
    return parts[".nested_quant_map"][codes.int()] * parts[".nested_absmax"][at] + options["offset"]


@jit
def _dequantize_kernel(
    packed_ptr: tl.tensor, scale_ptr: tl.tensor, offset_ptr: tl.tensor, levels_ptr: tl.tensor,
    out_ptr: tl.tensor, row_scale_ptr: tl.tensor,
    columns: tl.tensor, stack: tl.tensor, first_row: tl.tensor,
    LAYOUT: tl.constexpr, ELEMENTS: tl.constexpr, BYTES: tl.constexpr, SPAN: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One row. GROUP: of the rotation that makes int8 of a weight, or takes back that of an int4."""
    row = tl.program_id(0).to(tl.int64)
    stored = row + first_row
    column = tl.arange(0, BLOCK)
    inside = column < columns
    if LAYOUT == "int4":
        code = _nibbles(packed_ptr + stored * (columns // 2), columns, False, BLOCK)
        x = _int4(code, scale_ptr, levels_ptr, stored, columns, SPAN, BLOCK)
        x = tl.where(inside, x, 0.0)
    elif LAYOUT == "levels":
        code = _nibbles(packed_ptr + stored * (columns // 2), columns, True, BLOCK)
        x = tl.load(levels_ptr + code) * _spread(scale_ptr, stored, columns, SPAN, BLOCK)
    elif LAYOUT == "quanto4":
        x = _quanto(packed_ptr, scale_ptr, offset_ptr, stored * columns + column, inside, stack, SPAN, 4)
    elif LAYOUT == "quanto2":
        x = _quanto(packed_ptr, scale_ptr, offset_ptr, stored * columns + column, inside, stack, SPAN, 2)
    elif LAYOUT == "rows":
        x = tl.load(packed_ptr + stored * columns + column, mask=inside, other=0).to(tl.float32)
        x *= tl.load(scale_ptr + stored).to(tl.float32)
    else:
        row_ptr = packed_ptr + stored * (columns // ELEMENTS * BYTES)
        x = unpack_ggml(row_ptr, levels_ptr, columns, LAYOUT, ELEMENTS, BYTES, BLOCK)

    if LAYOUT == "int4":
        scale = tl.load(offset_ptr + stored)
        if row_scale_ptr is None:
            x = (rotate_in_registers(x, BLOCK, GROUP) if GROUP else x) * scale
            tl.store(out_ptr + row * columns + column, x.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            tl.store(out_ptr + row * columns + column, x.to(tl.int8), mask=inside)
            tl.store(row_scale_ptr + row, scale)
    elif row_scale_ptr is None:
        tl.store(out_ptr + row * columns + column, x.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        codes, scale = to_int8(x, BLOCK, GROUP)
        tl.store(out_ptr + row * columns + column, codes, mask=inside)
        tl.store(row_scale_ptr + row, scale)


@jit
def _nibbles(codes_ptr: tl.tensor, columns: tl.tensor, HIGH_FIRST: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """A row of 4-bit codes, two neighbours in a byte."""
    pair = tl.arange(0, BLOCK // 2)
    byte = tl.load(codes_ptr + pair, mask=pair < columns // 2, other=0).to(tl.int32)
    codes = tl.join(byte >> 4, byte & 15) if HIGH_FIRST else tl.join(byte & 15, byte >> 4)
    return tl.reshape(codes, (BLOCK,))


@jit
def _spread(
    scale_ptr: tl.tensor, row: tl.tensor, columns: tl.tensor, SPAN: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """The row's scales, each for SPAN columns; 0 beyond the row."""
    index = tl.arange(0, BLOCK // SPAN)
    scale = tl.load(scale_ptr + row * (columns // SPAN) + index, mask=index < columns // SPAN, other=0)
    return tl.reshape(tl.broadcast_to(scale[:, None], (BLOCK // SPAN, SPAN)), (BLOCK,))


@jit
def _int4(
    code: tl.tensor, scale_ptr: tl.tensor, levels_ptr: tl.tensor, row: tl.tensor, columns: tl.tensor,
    SPAN: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The integers below 128 that int4 stands for: round(level * e4m3 scale), or the signed nibbles themselves."""
    if scale_ptr is None:
        return ((code ^ 8) - 8).to(tl.float32)
    scale = _spread(scale_ptr, row, columns, SPAN, BLOCK).to(tl.int32)
    # e4m3 as float16 with its exponent 8 too small: older GPUs have no conversion from 8-bit floats.
    half = (((scale & 127) << 7) | ((scale & 128) << 8)).to(tl.uint16).to(tl.float16, bitcast=True)
    level = (code - 8).to(tl.float32) if levels_ptr is None else tl.load(levels_ptr + code)
    x = (level * (half.to(tl.float32) * 256) + 12582912.0) - 12582912.0  # rounds as in quantize.to_int8
    return tl.minimum(tl.maximum(x, -127.0), 127.0)


@jit
def _quanto(
    packed_ptr: tl.tensor, scale_ptr: tl.tensor, shift_ptr: tl.tensor, at: tl.tensor, inside: tl.tensor,
    stack: tl.tensor, SPAN: tl.constexpr, BITS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Group g of the weight is in row g % stack of the bytes, at bits BITS * (g // stack)."""
    group = at // SPAN
    byte = tl.load(packed_ptr + group % stack * SPAN + at % SPAN, mask=inside, other=0).to(tl.int32)
    code = ((byte >> (group // stack * BITS).to(tl.int32)) & (2**BITS - 1)).to(tl.float32)
    scale = tl.load(scale_ptr + group, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + group, mask=inside, other=0.0)
    product = (code * scale.to(tl.float32)).to(scale.dtype).to(tl.float32)  # rounded twice, as quanto does
    return (product - shift.to(tl.float32)).to(scale.dtype).to(tl.float32)


def variants(arch: int) -> list[Variant]:
    """Every layout at 3840 columns, and 10240 for the types that a file of this size usually has."""
    short, long = (*GGML_BLOCKS, "int4", "levels", "quanto4", "rows"), ("q8_0", "q4_k", "q5_k", "q6_k", "int4")
    weights = [(layout, 3840) for layout in short] + [(layout, 10240) for layout in long]
    return [_variant(*weight, out) for weight in weights for out in ("fp16" if arch < MATRIX_UNITS else "bf16", "i8")]


def _variant(layout: str, columns: int, out: str) -> Variant:
    elements, block_bytes = GGML_BLOCKS.get(layout, (0, 0))
    pointers = {"packed_ptr": "*i8" if layout == "rows" else "*u8", "out_ptr": f"*{out}"}
    pointers |= {"row_scale_ptr": "*fp32"} if out == "i8" else {}
    pointers |= {"levels_ptr": "*fp32"} if layout in ("iq4_nl", "iq4_xs", "int4", "levels") else {}
    scales = {"int4": ("*u8", "*fp32"), "levels": ("*fp32",), "quanto4": ("*bf16", "*bf16"), "rows": ("*bf16",)}
    pointers |= dict(zip(("scale_ptr", "offset_ptr"), scales.get(layout, ()), strict=False))
    optional = {"scale_ptr", "offset_ptr", "levels_ptr", "row_scale_ptr"}
    sizes = dict.fromkeys(("columns", *(("stack",) if layout == "quanto4" else ()), "first_row"), "i32")
    tile = row_tile(columns)
    return Variant(
        name=f"dequantize {layout} {columns} to {out}",
        kernel=_dequantize_kernel,
        signature={**pointers, **sizes},
        constexprs={
            **dict.fromkeys(optional - set(pointers)),
            **({} if "stack" in sizes else {"stack": 1}),
            "LAYOUT": layout, "ELEMENTS": elements, "BYTES": block_bytes,
            "SPAN": {"int4": 16, "levels": 64, "quanto4": 128}.get(layout, 1), "BLOCK": tile["BLOCK"],
            "GROUP": 256 if out == "i8" or layout == "int4" else 0,
        },
        aligned=(*pointers, *sizes),
        num_warps=tile["num_warps"],
    )  # fmt: skip
