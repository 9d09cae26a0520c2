"""Better scales for ggml's blocks: less squared error in the same bytes.

ggml weighs errors and rounds each scale on its own. Here the integer scales of the sub-blocks, the float16 scales of
the block and the codes are improved in turn, each with the other two fixed, and a step is kept only where the squared
error of a block falls, as it is or weighted by the importance of its columns. So what starts from ggml's own scales
never ends up worse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from types import ModuleType

import torch
from torch import Tensor

from . import search
from .importance import Importance
from .klayouts import Scales
from .loops import loops
from .search import PLAIN, Weighting, divide

ROUNDS = 4
CPU_PIECE_WEIGHTS = 2**17  # 512 KB of float32: the element-wise passes stay in the L2 cache


@dataclass(frozen=True)
class Grid:
    """What a block can store: elements per sub-block, codes, and the integer scales and minima of its sub-blocks."""

    sub_block: int
    low: int
    high: int
    scales: tuple[int, int] = (1, 1)
    minima: tuple[int, int] = (0, 0)
    table: bool = False  # the codes stand for IQ4_VALUES


def compiled(x: Tensor) -> ModuleType:
    """Where to search tensors on the device of x."""
    if x.device.type != "cpu":
        return search
    return loops("kquants_cpu")


def in_pieces(x: Tensor, importance: Importance | None = None) -> Iterator[tuple[Tensor, Importance | None]]:
    """x: [blocks, elements] in parts that suit its device, each with its importance."""
    blocks = max(CPU_PIECE_WEIGHTS // x.shape[1], 1) if x.device.type == "cpu" else max(x.shape[0], 1)
    parts = x.contiguous().split(blocks)
    if importance is None:
        yield from ((part, None) for part in parts)
        return
    split = (own.split(blocks) for own in importance)
    yield from zip(parts, (Importance(*own) for own in zip(*split, strict=True)), strict=True)


def nearest_codes(x: Tensor, grid: Grid, s: Scales, fallback: Tensor | None = None) -> Tensor:
    """x: [blocks, elements] -> the best code of every element, as stored, uint8; fallback: where the scale is 0."""
    subs = x.view(*s.sc.shape, grid.sub_block)
    scale = (s.d * s.sc).unsqueeze(2)
    zero = scale == 0
    if grid.table:
        return search.lookup_codes(subs * torch.where(zero, 0.0, divide(1, scale))).view_as(x)
    if grid.minima[1]:
        subs = subs + (s.dmin * s.mn).unsqueeze(2)
    codes = (subs / torch.where(zero, 1.0, scale)).round_().clamp_(grid.low, grid.high).sub_(grid.low).to(torch.uint8)
    if fallback is not None and zero.any():
        codes = torch.where(zero, fallback.view_as(codes), codes)
    return codes.view_as(x)


def best_of(
    searches: ModuleType, x: Tensor, grid: Grid, starts: list[Scales], importance: Tensor | None = None
) -> Scales:
    """x, importance: [blocks, elements]. Improves each start and takes the best result of each block."""
    x = x.reshape(-1, grid.sub_block)
    weighting = PLAIN if importance is None else importance.reshape(x.shape)
    chosen, error = _refine(searches, x, weighting, grid, starts[0])
    for start in starts[1:]:
        other, other_error = _refine(searches, x, weighting, grid, start)
        chosen, error = _where(other_error < error, other, chosen), torch.minimum(error, other_error)
    return chosen


def _where(mask: Tensor, yes: Scales, no: Scales) -> Scales:
    return Scales(*(torch.where(mask, a, b) for a, b in zip(yes, no, strict=True)))


def _score(searches: ModuleType, x: Tensor, weighting: Weighting, grid: Grid, candidates: list[Scales]) -> Tensor:
    """-> [4, candidates, blocks, sub-blocks], see `search.score`."""
    scale = torch.stack([s.d * s.sc for s in candidates])
    minimum = torch.stack([s.dmin * s.mn for s in candidates])
    flat = (len(candidates), -1)
    sums = searches.score(x, weighting, scale.view(flat), minimum.view(flat), grid.low, grid.high, grid.table)
    return sums.view(4, *scale.shape)


def _neighbours(grid: Grid, s: Scales) -> list[Scales]:
    """The scales themselves first, so that they win a draw."""
    moves = [(0, -1, 1) if low < high else (0,) for low, high in (grid.scales, grid.minima)]
    return [
        s._replace(sc=(s.sc + up).clamp(*grid.scales), mn=(s.mn + down).clamp(*grid.minima))
        for up, down in product(*moves)
    ]


def _refine(searches: ModuleType, x: Tensor, weighting: Weighting, grid: Grid, s: Scales) -> tuple[Scales, Tensor]:
    """-> scales and the squared error of each block, [blocks, 1]."""
    s = Scales(*(part.half().float() for part in s))  # integers up to 2048 are float16s
    for _ in range(ROUNDS):
        candidates = _neighbours(grid, s)
        sums = _score(searches, x, weighting, grid, candidates)
        which = sums[0].argmin(0, keepdim=True)
        sc = torch.stack([c.sc for c in candidates]).gather(0, which)[0]
        mn = torch.stack([c.mn for c in candidates]).gather(0, which)[0]
        s = s._replace(sc=sc, mn=mn)
        sums = sums.gather(1, which.expand(4, *which.shape))[:, 0]
        error = sums[0].sum(1, keepdim=True)
        refitted = _refit(x, weighting, grid, s, sums.double())
        new_error = _score(searches, x, weighting, grid, [refitted])[0, 0].sum(1, keepdim=True)
        better = new_error < error
        s, error = _where(better, refitted, s), torch.where(better, new_error, error)
        if not (better.any() or which.any()):
            break  # no block moved; those at rest stay there, so a block does not depend on its neighbours
    return s, error.nan_to_num(torch.inf)  # where a float16 scale overflows, any other start is better


def _refit(x: Tensor, weighting: Weighting, grid: Grid, s: Scales, sums: Tensor) -> Scales:
    """The float16 scales that fit best with all integers as they are: least squares in one or two unknowns."""
    _, sum_v, sum_v2, sum_vx = sums
    a = (s.sc * s.sc * sum_v2).sum(1, keepdim=True)
    p = (s.sc * sum_vx).sum(1, keepdim=True)
    d, dmin = p / a, s.dmin
    if grid.minima[1]:
        w = weighting.double() if isinstance(weighting, Tensor) else torch.ones_like(x, dtype=torch.float64)
        sum_x, sum_w = (w * x).sum(1).view_as(s.mn), w.sum(1).view_as(s.mn)
        b = (s.sc * s.mn * sum_v).sum(1, keepdim=True)
        c = (s.mn * s.mn * sum_w).sum(1, keepdim=True)
        q = (s.mn * sum_x).sum(1, keepdim=True)
        determinant = a * c - b * b
        d = torch.where(determinant > 0, (p * c - b * q) / determinant, d)
        dmin = torch.where(determinant > 0, ((b * p - a * q) / determinant), s.dmin)
    d, dmin = d.half().float(), dmin.half().float()
    usable = d.isfinite() & dmin.isfinite()
    return s._replace(d=torch.where(usable, d, s.d), dmin=torch.where(usable, dmin, s.dmin))
