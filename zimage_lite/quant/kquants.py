"""Quantizers and dequantizers for ggml's K-quants and IQ4 types.

A super-block of 256 holds a float16 scale, small integer scales for its sub-blocks, and codes. Three efforts:
`reference` gives the bytes of ggml, with an importance matrix or without; `fast` tries fewer candidates where there is
none; `best` looks for the least squared error, starting from both ggml's scales and its own. The searches run compiled
on the CPU and as torch elsewhere, with the same result; what surrounds them is torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from .formats import EFFORTS
from .importance import Importance, share_scale
from .klayouts import PACK_BITS, UNPACK, Scales
from .refine import Grid, best_of, compiled, in_pieces, nearest_codes
from .search import (
    MAGNITUDE,
    MIXED,
    PLAIN,
    SQUARED,
    ZERO_BELOW,
    Weighting,
    around,
    divide,
    ordered_sum,
    steps_up,
)

__all__ = ["PACK", "UNPACK"]

_LARGEST = torch.finfo(torch.float32).max

GRIDS = {
    "q2_k": Grid(16, 0, 3, scales=(0, 15), minima=(0, 15)),
    "q3_k": Grid(16, -4, 3, scales=(-32, 31)),
    "q4_k": Grid(32, 0, 15, scales=(0, 63), minima=(0, 63)),
    "q5_k": Grid(32, 0, 31, scales=(0, 63), minima=(0, 63)),
    "q6_k": Grid(16, -32, 31, scales=(-128, 127)),
    "iq4_nl": Grid(32, 0, 15, table=True),
    "iq4_xs": Grid(32, 0, 15, scales=(-32, 31), table=True),
}

# Into how many codes more than there are the range of a sub-block is spread: first, step, count; and ggml's weights.
_AFFINE = {"q2_k": (-0.5, 0.1, 16, MAGNITUDE), "q4_k": (-1.0, 0.1, 21, MIXED), "q5_k": (-0.5, 0.1, 16, MIXED)}
_AFFINE_FAST = {"q2_k": (-0.2, 0.4, 2, MAGNITUDE), "q4_k": (-1.0, 0.4, 4, MIXED), "q5_k": (-1.0, 0.4, 4, MIXED)}
_AFFINE_BEST = {"q2_k": (-0.8, 0.1, 16, PLAIN), "q4_k": (-3.0, 0.2, 24, PLAIN), "q5_k": (-4.0, 0.2, 28, PLAIN)}
WEIGHTED_STEPS = (-0.9, 0.05, 37)  # ggml's, where there is an importance matrix
# Where the extreme is laid: step, and how many steps to either side of the lowest code.
_SYMMETRIC_BEST = {"q3_k": (0.15, 10), "q6_k": (0.25, 40)}


def _search_affine(
    name: str, searches: ModuleType, x: Tensor, effort: str, given: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    first, step, count, own = {"fast": _AFFINE_FAST, "reference": _AFFINE, "best": _AFFINE_BEST}[effort][name]
    weighting: Weighting = own if given is None else given
    if given is not None and effort != "best":
        first, step, count = WEIGHTED_STEPS
    top = GRIDS[name].high
    absolute = name == "q2_k" and effort != "best" and given is None
    scale, minimum, codes = searches.affine(x, weighting, top, steps_up(first, step, count, top), absolute, False)
    return scale, minimum, codes


def _search_symmetric(
    name: str, searches: ModuleType, x: Tensor, effort: str, given: Tensor | None
) -> tuple[Tensor, Tensor]:
    top = -GRIDS[name].low
    if effort == "best":
        return searches.symmetric(x, PLAIN if given is None else given, top, around(top, *_SYMMETRIC_BEST[name]))
    if given is not None:
        return searches.symmetric(x, given, top, around(top, 0.1, 9))
    if name == "q3_k":
        return searches.descend(x, top, 5 if effort == "reference" else 1)
    return searches.symmetric(x, SQUARED, top, around(top, 0.1, 9) if effort == "reference" else around(top, 0.4, 2))


def _search_lookup(searches: ModuleType, x: Tensor, effort: str, given: Tensor | None) -> Tensor:
    if given is not None and effort == "fast":
        effort = "reference"
    first, step, count = {"fast": (-128, 2, 2), "reference": (-134, 1, 15), "best": (-136, 1, 20)}[effort]
    steps = first + step * torch.arange(count, dtype=torch.float32)
    own = PLAIN if effort == "best" else SQUARED
    return searches.lookup(
        x, own if given is None else given, torch.cat((steps, -steps)) if effort == "best" else steps
    )


def _share_scale(values: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """[blocks, sub-blocks] >= 0 -> float16 scale, and integers up to `top`."""
    peak = values.amax(1, keepdim=True)
    peak = torch.where(peak > 0, peak, 0.0)  # not -0
    inverse = torch.where(peak > 0, divide(top, peak).clamp_(max=_LARGEST), 0.0)
    return (peak / torch.full_like(peak, top)).half().float(), (inverse * values).round_().clamp_(0, top)


def _share_signed_scale(scale: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """[blocks, sub-blocks] -> scale (unrounded), and integers; the largest scale becomes `low`."""
    peak = scale.gather(1, scale.abs().argmax(1, keepdim=True))
    inverse = torch.where(peak != 0, divide(low, peak).clamp_(-_LARGEST, _LARGEST), 0.0)
    d = torch.where(peak != 0, divide(1, inverse), 0.0)
    return d, (inverse * scale).round_().clamp_(low, high)


def _find_scales(
    name: str, searches: ModuleType, x: Tensor, effort: str, given: Tensor | None = None
) -> tuple[Scales, Tensor | None]:
    """x, given (its weights): [blocks, elements] -> scales, and the codes of the search for sub-blocks whose integer
    scale becomes 0."""
    grid = GRIDS[name]
    subs = x.reshape(-1, grid.sub_block)
    shape = (x.shape[0], -1)
    weights = None if given is None else given.reshape(subs.shape)
    of_subs = None if weights is None or effort == "best" else ordered_sum(weights).view(shape)
    if name in _AFFINE:
        scale, minimum, codes = _search_affine(name, searches, subs, effort, weights)
        d, sc = _shared(scale.view(shape), of_subs, grid.scales[1])
        dmin, mn = _shared(minimum.view(shape), of_subs, grid.minima[1])
        return Scales(d, sc, dmin, mn), codes
    fallback = None
    if grid.table:
        scale = _search_lookup(searches, subs, effort, weights).view(shape)
    else:
        scale, fallback = _search_symmetric(name, searches, subs, effort, weights)
        scale = scale.view(shape)
        if name == "q6_k":  # ggml clears these blocks, codes and all
            kept = scale.abs().amax(1, keepdim=True) >= ZERO_BELOW
            scale, fallback = scale * kept, fallback.view_as(x) * kept
    if grid.scales == (1, 1):
        d, sc = scale, torch.ones_like(scale)
    elif grid.table:
        peak = scale.gather(1, scale.abs().argmax(1, keepdim=True))
        d, sc = peak / -32, _share_signed_scale(scale, *grid.scales)[1]
    elif name == "q3_k" and of_subs is not None:
        d, found = searches.symmetric(scale, of_subs, 32, around(32, 0.1, 9))
        d, sc = d.view(-1, 1).half().float(), found.float() - 32
    else:
        d, sc = _share_signed_scale(scale, *grid.scales)
        if name == "q3_k":
            sc = torch.where(d == 0, -32.0, sc)  # in a block of zeros all stored bytes are 0
        d = d.half().float()
    return Scales(d, sc, torch.zeros_like(d), torch.zeros_like(sc)), fallback


def _shared(values: Tensor, weights: Tensor | None, top: int) -> tuple[Tensor, Tensor]:
    return _share_scale(values, top) if weights is None else share_scale(values, weights, top)


def scales_of(
    name: str, searches: ModuleType, x: Tensor, effort: str, importance: Importance | None = None
) -> tuple[Scales, Tensor | None]:
    """x: [blocks, elements] -> its scales, and what `nearest_codes` takes beside them."""
    searched, counted = (None, None) if importance is None else (importance.searched, importance.counted)
    scales, fallback = _find_scales(name, searches, x, "reference" if effort == "best" else effort, searched)
    if effort == "best":
        own, _ = _find_scales(name, searches, x, "best", counted)
        scales = best_of(searches, x, GRIDS[name], [scales, own], counted)
    return scales, fallback


def pack(
    name: str, x: Tensor, effort: str = "reference", searches: ModuleType | None = None,
    importance: Importance | None = None,
) -> Tensor:  # fmt: skip
    """x: [blocks, elements] float32 -> [blocks, block bytes] uint8, on the device of x."""
    if effort not in EFFORTS:
        raise ValueError(f"effort: got {effort!r}, expected one of {EFFORTS}")
    searches, found = searches or compiled(x), []
    for piece, own in in_pieces(x, importance):
        scales, fallback = scales_of(name, searches, piece, effort, own)
        found.append(PACK_BITS[name](scales, nearest_codes(piece, GRIDS[name], scales, fallback)))
    return torch.cat(found)


PACK: dict[str, Callable[..., Tensor]] = {name: partial(pack, name) for name in GRIDS}
