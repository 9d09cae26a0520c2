"""The effort `best` for ggml's blocks of 32 with one scale (and minimum): q4_0, q4_1, q5_0, q5_1, q8_0.

ggml takes scale and minimum from the extremes, or searches where there is an importance matrix. Here they are fitted,
starting from ggml's and from the best of some dozens of other scales; the bytes mean the same to whoever reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from .bits import half_bytes, join_bits
from .blocks import pack_codes
from .importance import Importance
from .klayouts import Scales
from .kquants import WEIGHTED_STEPS
from .refine import Grid, best_of, compiled, in_pieces, nearest_codes
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


def _starts(name: str, searches: ModuleType, x: Tensor, importance: Importance | None) -> list[Scales]:
    """ggml's scales, then our own."""
    grid = GRIDS[name]
    ones = x.new_ones(x.shape[0], 1)
    weighting = PLAIN if importance is None else importance.counted
    ggml = None if importance is None or name == "q8_0" else _weighted(name, searches, x, importance.searched)[0]
    if name in _AFFINE:
        first, step, count = _AFFINE[name]
        low, high = torch.aminmax(x, dim=1, keepdim=True)
        d = (high - low) / torch.full_like(low, grid.high)
        steps = steps_up(first, step, count, grid.high)
        scale, minimum, _ = searches.affine(x, weighting, grid.high, steps, False, True)
        own = Scales(scale.view_as(d), ones, minimum.view_as(d), ones)
        return [ggml or Scales(d, ones, -low, ones), own]
    extreme = x.gather(1, x.abs().argmax(1, keepdim=True))
    d = extreme / torch.full_like(extreme, grid.low)
    scale, _ = searches.symmetric(x, weighting, -grid.low, around(-grid.low, *_SYMMETRIC[name]))
    zeros = torch.zeros_like(ones)
    return [ggml or Scales(d, ones, zeros, zeros), Scales(scale.view_as(d), ones, zeros, zeros)]


def _weighted(name: str, searches: ModuleType, x: Tensor, weights: Tensor) -> tuple[Scales, Tensor]:
    """ggml's scales and codes with an importance matrix; the codes go with the scale before it is a float16."""
    ones, grid = x.new_ones(x.shape[0], 1), GRIDS[name]
    if name in _AFFINE:
        scale, minimum, codes = searches.affine(
            x, weights, grid.high, steps_up(*WEIGHTED_STEPS, grid.high), False, False
        )
        return Scales(scale.view_as(ones), ones, minimum.view_as(ones), ones), codes
    scale, codes = searches.symmetric(x, weights, -grid.low, around(-grid.low, 0.1, 9))
    return Scales(scale.view_as(ones), ones, torch.zeros_like(ones), torch.zeros_like(ones)), codes


def scales_of(name: str, searches: ModuleType, x: Tensor, importance: Importance | None = None) -> Scales:
    """x: [blocks, 32] -> the best scales."""
    counted = None if importance is None else importance.counted
    return best_of(searches, x, GRIDS[name], _starts(name, searches, x, importance), counted)


def bits(name: str, scales: Scales, codes: Tensor) -> Tensor:
    """-> [blocks, block bytes] uint8."""
    head = half_bytes(scales.d, -scales.dmin) if GRIDS[name].minima[1] else half_bytes(scales.d)
    if name == "q8_0":
        body = codes - 127  # wraps around to the bits of a signed byte
    elif name.startswith("q5"):
        body = pack_codes(codes)
    else:
        body = join_bits(codes.view(-1, 2, 16), 4)
    return torch.cat((head, body), dim=1)


def pack_best(name: str, x: Tensor, searches: ModuleType | None = None, importance: Importance | None = None) -> Tensor:
    """x: [blocks, 32] float32 -> [blocks, block bytes] uint8, on the device of x."""
    searches, found = searches or compiled(x), []
    for piece, own in in_pieces(x, importance):
        scales = scales_of(name, searches, piece, own)
        found.append(bits(name, scales, nearest_codes(piece, GRIDS[name], scales)))
    return torch.cat(found)


def pack_weighted(name: str, x: Tensor, importance: Importance, searches: ModuleType | None = None) -> Tensor:
    """The same, as ggml does it with an importance matrix."""
    searches, found = searches or compiled(x), []
    for piece, own in in_pieces(x, importance):
        assert own is not None
        found.append(bits(name, *_weighted(name, searches, piece, own.searched)))
    return torch.cat(found)


PACK_BEST: dict[str, Callable[..., Tensor]] = {name: partial(pack_best, name) for name in GRIDS}
