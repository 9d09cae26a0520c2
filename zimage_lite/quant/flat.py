"""The effort `best` for ggml's blocks of 32 with one scale (and minimum): q4_0, q4_1, q5_0, q5_1, q8_0.

ggml takes scale and minimum from the extremes. Here they are fitted, starting from ggml's and from the best of some
dozens of other scales; the bytes mean the same to whoever reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from .bits import half_bytes, join_bits
from .blocks import pack_codes
from .klayouts import Scales
from .refine import Grid, best_of, compiled, nearest_codes, pieces
from .search import PLAIN, around, steps_up

GRIDS = {
    "q4_0": Grid(32, -8, 7),
    "q4_1": Grid(32, 0, 15, minima=(1, 1)),
    "q5_0": Grid(32, -16, 15),
    "q5_1": Grid(32, 0, 31, minima=(1, 1)),
    "q8_0": Grid(32, -127, 127),  # -128 is legal, but AVX2 readers negate codes in 8 bits
}
# How the scales to try differ, in codes: step and count (of either sign, or from the first on).
_SYMMETRIC = {"q4_0": (0.15, 14), "q5_0": (0.25, 20), "q8_0": (0.5, 40)}
_AFFINE = {"q4_1": (-3.0, 0.2, 24), "q5_1": (-4.0, 0.25, 28)}


def _starts(name: str, searches: ModuleType, x: Tensor) -> list[Scales]:
    """ggml's scales, then our own."""
    grid = GRIDS[name]
    ones = x.new_ones(x.shape[0], 1)
    if name in _AFFINE:
        first, step, count = _AFFINE[name]
        low, high = torch.aminmax(x, dim=1, keepdim=True)
        d = (high - low) / torch.full_like(low, grid.high)
        steps = steps_up(first, step, count, grid.high)
        scale, minimum, _ = searches.affine(x, PLAIN, grid.high, steps, False, True)
        return [Scales(d, ones, -low, ones), Scales(scale.view_as(d), ones, minimum.view_as(d), ones)]
    extreme = x.gather(1, x.abs().argmax(1, keepdim=True))
    d = extreme / torch.full_like(extreme, grid.low)
    scale, _ = searches.symmetric(x, False, -grid.low, around(-grid.low, *_SYMMETRIC[name]))
    zeros = torch.zeros_like(ones)
    return [Scales(start.view_as(d), ones, zeros, zeros) for start in (d, scale)]


def _pack_piece(name: str, searches: ModuleType, x: Tensor) -> Tensor:
    grid = GRIDS[name]
    scales = best_of(searches, x, grid, _starts(name, searches, x))
    codes = nearest_codes(x, grid, scales)
    head = half_bytes(scales.d, -scales.dmin) if grid.minima[1] else half_bytes(scales.d)
    if name == "q8_0":
        body = codes - 127  # wraps around to the bits of a signed byte
    elif name.startswith("q5"):
        body = pack_codes(codes)
    else:
        body = join_bits(codes.view(-1, 2, 16), 4)
    return torch.cat((head, body), dim=1)


def pack_best(name: str, x: Tensor, searches: ModuleType | None = None) -> Tensor:
    """x: [blocks, 32] float32 -> [blocks, block bytes] uint8, on the device of x."""
    searches = searches or compiled(x)
    return torch.cat([_pack_piece(name, searches, piece) for piece in pieces(x)])


PACK_BEST: dict[str, Callable[[Tensor], Tensor]] = {name: partial(pack_best, name) for name in GRIDS}
