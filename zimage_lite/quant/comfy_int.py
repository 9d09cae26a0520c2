"""ComfyUI's 4-bit integers: `int4` (asym_w4a8_int8) and `convrot_w4a4`.

int4   rows are rotated by ConvRot; 16 columns share an e4m3 scale and a row a float32 one. A code names one of 16
       levels, and level x group scale is rounded to an integer below 128, so that the multiplication can run in int8:
           W H = round(codebook[code] * s_rel) * s_channel
       A byte holds an even column in its low nibble. Without a codebook the levels are code - 8. Files made
       by others may have 6-bit codes (a plane of low nibbles, then one of the 2 high bits; levels code - 32), and
       a correction to add to each group.
convrot_w4a4  signed nibbles and one scale per row, rotated

Source of layouts and codebook: comfy-kitchen 0.2.40. The group scales are chosen better than there, and where it is
known what rows are multiplied by, by that: H as it is after the rotation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from zimage_kernels import hadamard_rotate

from .compensate import compensated
from .formats import Codec, Format, Layout, Options, Parts, Shapes
from .inputs import Inputs
from .int8 import rotation_group
from .levels import Levels, searched
from .pieces import by_pieces, count_below, from_float8, pack_nibbles, unpack_nibbles, widen

SCALE_GROUP = 16

# The 16 levels that lose least of a Gaussian whose groups are divided by their largest value. comfy-kitchen writes
# these for every rotated weight that looks Gaussian, and its fastest kernels know no others.
_CODEBOOK = (
    -0.980602, -0.794529, -0.638165, -0.500986, -0.377321, -0.263187, -0.155210, -0.050720,
    0.052541, 0.156985, 0.265284, 0.379533, 0.502636, 0.638953, 0.794876, 0.980671,
)  # fmt: skip

# Group scales to try, in e4m3 steps (6 to 12 %) from max|w|. Relative error of a Gaussian: 7.31 % in comfy-kitchen,
# 7.20 % with three, 7.11 % with seven.
_STEPS = {"fast": (0, 1), "reference": (0, -1, 1), "best": (0, -1, 1, -2, 2, -3, 3)}
_E4M3_LARGEST = 0x7E

# The nearest level is read from a table of cells, evenly from -_REACH to _REACH.
_CELLS, _REACH = 4096, 1.0625


class Int4Codec(Codec):
    def options(self, columns: int) -> Options:
        return {"group": rotation_group(columns), "scale_group": SCALE_GROUP}

    def marker(self, options: Options) -> dict[str, Any]:
        """ComfyUI needs no "convrot", but SGLang refuses a marker without it."""
        group, scale_group = options["group"], options["scale_group"]
        return {"format": "asym_w4a8_int8", "group_size": scale_group, "convrot": True, "convrot_groupsize": group}

    def layout(self, rows: int, columns: int, options: Options) -> Layout:
        """What `quantize` writes. In the files of others "bits" may be 6, and `_codebook` absent."""
        bits = options.get("bits", 4)
        return {
            "": ("I8", (rows, columns * bits // 8)),
            "_s_rel": ("F8_E4M3", (rows, columns // options["scale_group"])),
            "_s_channel": ("F32", (rows, 1)),
            "_codebook": ("F32", (16,)),
        }

    def stored(self, rows: int, columns: int, options: Options) -> Shapes:
        return super().stored(rows, columns, options) | {"_s_channel": (rows,)}

    def quantize(self, x: Tensor, options: Options, effort: str = "reference", inputs: Inputs | None = None) -> Parts:
        codebook = torch.tensor(_CODEBOOK, device=x.device)
        group, known = options["scale_group"], None if inputs is None else inputs.rotated(options["group"])
        counted = None if known is None else known.squares.to(x.device)
        if known is not None and effort == "best":
            rotated = hadamard_rotate(x, options["group"])
            return {**_compensated_int4(rotated, group, codebook, known), "_codebook": codebook}

        def pack(piece: slice) -> Parts:
            rotated = hadamard_rotate(x[piece], options["group"])
            return _pack_int4(rotated, group, codebook, effort, counted)

        return {**by_pieces(x.shape[0], x.shape[1], pack), "_codebook": codebook}

    def dequantize(self, parts: Parts, columns: int, options: Options) -> Tensor:
        channel = parts["_s_channel"].reshape(-1, 1)

        def unpack(piece: slice) -> Tensor:
            return hadamard_rotate(self._rotated(parts, piece, columns, options).mul_(channel[piece]), options["group"])

        return widen(parts[""].shape[0], columns, unpack)

    def rotated_int8(self, parts: Parts, columns: int, options: Options) -> tuple[Tensor, Tensor]:
        """What it stands for: codes [rows, columns] int8, scales [rows]."""
        return self._rotated(parts, slice(None), columns, options).char(), parts["_s_channel"].reshape(-1)

    def _rotated(self, parts: Parts, piece: slice, columns: int, options: Options) -> Tensor:
        """Rows in units of their scale: integers up to 127, as float32."""
        packed, relative, group = parts[""].view(torch.uint8), parts["_s_rel"], options["scale_group"]
        relative = relative.view(torch.float8_e4m3fn) if relative.itemsize == 1 else relative
        levels = _levels(packed[piece], columns, parts.get("_codebook")).view(-1, columns // group, group)
        return levels.mul_(from_float8(relative[piece]).unsqueeze(2)).round_().clamp_(-127, 127).view(-1, columns)


def _levels(packed: Tensor, columns: int, codebook: Tensor | None) -> Tensor:
    """Bytes as stored -> the level that each code names: [rows, columns] float32."""
    codes = torch.arange(16, dtype=torch.float32, device=packed.device)
    if packed.shape[1] * 2 == columns:
        return unpack_nibbles(packed, codes - 8 if codebook is None else codebook.float(), high_first=False)
    low = unpack_nibbles(packed[:, : columns // 2], codes - 32, high_first=False)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device)
    high = (packed[:, columns // 2 :].unsqueeze(2) >> shifts) & 3
    return low.add_(high.view(-1, columns), alpha=16)


def _channel(rotated: Tensor, codebook: Tensor) -> Tensor:
    """[rows, 1]: the row's largest level becomes 127. Below 1e-30 everything is 0."""
    return (rotated.abs().amax(1, keepdim=True) * (codebook.abs().amax() / 127)).clamp_(min=1e-30)


def _pack_int4(rotated: Tensor, group: int, codebook: Tensor, effort: str, counted: Tensor | None = None) -> Parts:
    """Works on [columns of a group, groups]: sums over a group are then sums of long rows. counted: [columns], what
    squared errors count."""
    rows, columns = rotated.shape
    channel = _channel(rotated, codebook)
    x = rotated.view(-1, group).t().contiguous()
    extreme = x.abs().amax(0).view(rows, -1)
    x.view(group, rows, -1).div_(channel)
    start = (extreme / channel).flatten().to(torch.float8_e4m3fn)
    weights = None if counted is None else counted.view(-1, group).t().repeat(1, rows)
    scale = _best_scale(x, start, codebook, _STEPS[effort], weights)
    if effort == "best":
        levels = (codebook.unsqueeze(1) * scale.float()).round_().clamp_(-127, 127)
        codes = count_below(x, (levels[1:] + levels[:-1]).div_(2))
    else:  # loses 0.2 % of the error, and takes a sixth of the time
        codes = _nearest_codes(codebook).index_select(0, _cells(x, scale.float()).flatten()).view(x.shape)
    return _packed(codes.t().reshape(rows, columns), scale.view(rows, -1), channel)


def _packed(codes: Tensor, scale: Tensor, channel: Tensor) -> Parts:
    """codes: [rows, columns] uint8"""
    return {"": pack_nibbles(codes, high_first=False).view(torch.int8), "_s_rel": scale, "_s_channel": channel}


class _GroupScales:
    """What the groups of rows can be multiplied by: e4m3 numbers, stored as their bits in int16, times the row's
    scale. channel: [rows]."""

    def __init__(self, codebook: Tensor, channel: Tensor) -> None:
        self.codebook, self.channel = codebook, channel

    def near(self, scale: Tensor) -> list[Tensor]:
        stored = (scale / self.channel).clamp(max=448).to(torch.float8_e4m3fn).view(torch.uint8).short()
        return [(stored + step).clamp(0, _E4M3_LARGEST) for step in (0, -1, 1)]

    def value(self, stored: Tensor) -> Tensor:
        return stored.byte().view(torch.float8_e4m3fn).float() * self.channel

    def levels(self, stored: Tensor) -> Tensor:
        relative = stored.byte().view(torch.float8_e4m3fn).float()
        return (self.codebook.unsqueeze(1) * relative).round_().clamp_(-127, 127).mul_(self.channel)


def _compensated_int4(rotated: Tensor, group: int, codebook: Tensor, known: Inputs) -> Parts:
    channel = _channel(rotated, codebook)
    scales = _GroupScales(codebook, channel.flatten())

    def fit(number: int, block: Tensor, counted: Tensor) -> Levels:
        return Levels(scales, group, searched(scales, block.t().contiguous(), counted.unsqueeze(1)))

    blocks = compensated(rotated, known, group, fit)
    codes = torch.cat([block.codes for block in blocks]).t().contiguous()
    stored = torch.stack([block.stored for block in blocks], dim=1)
    return _packed(codes, stored.byte().view(torch.float8_e4m3fn), channel)


def _best_scale(x: Tensor, start: Tensor, codebook: Tensor, steps: tuple[int, ...], weights: Tensor | None) -> Tensor:
    """For each group the e4m3 scale near `start` that reproduces it best. x: [columns of a group, groups]; weights:
    the same, of squared errors, if they differ."""
    nearest = codebook[_nearest_codes(codebook).int()]
    best_scale, best_error = start.view(torch.uint8), torch.full_like(x[0], torch.inf)
    for step in steps:
        scale = (start.view(torch.uint8).short() + step).clamp_(0, _E4M3_LARGEST).byte()
        wide = scale.view(torch.float8_e4m3fn).float()
        levels = nearest.index_select(0, _cells(x, wide).flatten()).view(x.shape)
        squared = levels.mul_(wide).round_().clamp_(-127, 127).sub_(x).square_()
        error = (squared if weights is None else squared.mul_(weights)).sum(0)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale.view(torch.float8_e4m3fn)


def _cells(x: Tensor, scale: Tensor) -> Tensor:
    """Where x / scale lies in the table of nearest codes."""
    factor = (_CELLS / 2 / _REACH) / scale.clamp(min=2**-9)  # the smallest e4m3 number, for groups of zeros
    return (x * factor).add_(_CELLS / 2).clamp_(0, _CELLS - 1).int()


def _nearest_codes(codebook: Tensor) -> Tensor:
    """[_CELLS] uint8: the code of the level nearest to the middle of each cell."""
    middles = (torch.arange(_CELLS, device=codebook.device) + 0.5) * (2 * _REACH / _CELLS) - _REACH
    return count_below(middles, (codebook[1:] + codebook[:-1]) / 2)


class ConvrotW4A4Codec(Codec):
    def options(self, columns: int) -> Options:
        return {"group": rotation_group(columns)}

    def marker(self, options: Options) -> dict[str, Any]:
        return {"format": "convrot_w4a4", "convrot_groupsize": options["group"]}

    def layout(self, rows: int, columns: int, options: Options) -> Layout:
        return {"": ("I8", (rows, columns // 2)), "_scale": ("F32", (rows, 1))}

    def stored(self, rows: int, columns: int, options: Options) -> Shapes:
        return {"": (rows, columns // 2), "_scale": (rows,)}

    def dequantize(self, parts: Parts, columns: int, options: Options) -> Tensor:
        scale = parts["_scale"].reshape(-1, 1)

        def unpack(piece: slice) -> Tensor:
            return hadamard_rotate(self._rotated(parts, piece).mul_(scale[piece]), options["group"])

        return widen(parts[""].shape[0], columns, unpack)

    def rotated_int8(self, parts: Parts, columns: int, options: Options) -> tuple[Tensor, Tensor]:
        """What it stands for: codes [rows, columns] int8, scales [rows]."""
        return self._rotated(parts, slice(None)).char(), parts["_scale"].reshape(-1)

    def _rotated(self, parts: Parts, piece: slice) -> Tensor:
        """Codes from -8 to 7, as float32."""
        values = torch.tensor([*range(8), *range(-8, 0)], dtype=torch.float32, device=parts[""].device)
        return unpack_nibbles(parts[""][piece], values, high_first=False)


CODECS: dict[str, Codec] = {"int4": Int4Codec(), "convrot_w4a4": ConvrotW4A4Codec()}


def codec(row: Format) -> Codec:
    return CODECS[row.name]
