# mypy: allow-untyped-defs
"""The searches of `search`, compiled: the same functions with the same bits, for the CPU.

Sub-blocks go through in tiles of 64, transposed to [element, lane]: the vectoriser turns the inner loop over lanes into
AVX2, AVX-512 or NEON, while the sums of each lane keep ggml's order. Scratch arrays instead of local sums, because the
element loop is the outer one; they stay in L1.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from zimage_kernels._numba import compiled

from .search import GIVEN, IQ4_BORDERS, IQ4_VALUES, MIXED, PLAIN, SQUARED, ZERO_BELOW, Weighting

LANES = 64
ZERO, ONE = np.float32(0), np.float32(1)
MAGIC = np.float32(1.5 * 2**23)  # adding and subtracting it rounds to an integer, half to even, below 2^22
_EPS = np.float32(ZERO_BELOW)
_VALUES = np.array(IQ4_VALUES, np.float32)
_STEPS = np.diff(_VALUES)
_BORDERS = np.array(IQ4_BORDERS, np.float32)


@compiled
def _tile(n):
    return np.empty((n, LANES), np.float32)


@compiled
def _lane():
    return np.empty(LANES, np.float32)


@compiled
def _eight_lanes():
    """Arrays of their own: numba forgets that the rows of one array are contiguous, and nothing vectorises (6 x)."""
    return _lane(), _lane(), _lane(), _lane(), _lane(), _lane(), _lane(), _lane()


@compiled
def _load(x, start, tile):
    """Sub-blocks from `start` on; lanes past the end repeat the last one."""
    for t in range(LANES):
        row = min(start + t, x.shape[0] - 1)
        for i in range(x.shape[1]):
            tile[i, t] = x[row, i]


@compiled
def _store(codes, start, out):
    for t in range(min(LANES, out.shape[0] - start)):
        for i in range(out.shape[1]):
            out[start + t, i] = np.uint8(codes[i, t])


@compiled
def _weigh(x, start, weighting, given, w, scratch):
    """w: what errors in the tile x count; its sub-blocks are given[start:] and on."""
    n = x.shape[0]
    if weighting == GIVEN:
        _load(given, start, w)
        return
    for t in range(LANES):
        scratch[t] = ZERO
    if weighting == MIXED:
        for i in range(n):
            for t in range(LANES):
                scratch[t] += x[i, t] * x[i, t]
        for t in range(LANES):
            scratch[t] = np.sqrt(scratch[t] / np.float32(n))
    for i in range(n):
        for t in range(LANES):
            v = x[i, t]
            w[i, t] = ONE if weighting == PLAIN else v * v if weighting == SQUARED else scratch[t] + abs(v)


@compiled
def _affine_codes(x, multiplier, base, top, codes):
    for i in range(x.shape[0]):
        for t in range(LANES):
            v = (multiplier[t] * (x[i, t] - base[t]) + MAGIC) - MAGIC
            v = v if v > ZERO else ZERO
            codes[i, t] = v if v < top else top


@compiled
def _affine_sums(x, w, codes, sum_l, sum_l2, sum_xl):
    for t in range(LANES):
        sum_l[t] = sum_l2[t] = sum_xl[t] = ZERO
    for i in range(x.shape[0]):
        for t in range(LANES):
            wl = w[i, t] * codes[i, t]
            sum_l[t] += wl
            sum_l2[t] += wl * codes[i, t]
            sum_xl[t] += wl * x[i, t]


@compiled
def _affine_error(x, w, codes, absolute, scale, base, error):
    for t in range(LANES):
        error[t] = ZERO
    for i in range(x.shape[0]):
        for t in range(LANES):
            off = (scale[t] * codes[i, t] + base[t]) - x[i, t]
            error[t] += w[i, t] * (abs(off) if absolute else off * off)


@compiled
def _affine(x, weighting, given, top, steps, absolute, free, scales, minima, all_codes):
    n = x.shape[1]
    tile, w, codes = _tile(n), _tile(n), _tile(n)
    low, high, sum_w, sum_x, scale, best, best_multiplier, best_base = _eight_lanes()
    multiplier, sum_l, sum_l2, sum_xl, new_scale, new_low, error, flat = _eight_lanes()
    for start in range(0, x.shape[0], LANES):
        _load(x, start, tile)
        _weigh(tile, start, weighting, given, w, sum_x)
        for t in range(LANES):
            low[t] = tile[0, t]
            high[t] = tile[0, t]
            sum_w[t] = sum_x[t] = ZERO
        for i in range(n):
            for t in range(LANES):
                v = tile[i, t]
                low[t] = v if v < low[t] else low[t]
                high[t] = v if v > high[t] else high[t]
                sum_w[t] += w[i, t]
                sum_x[t] += w[i, t] * v
        for t in range(LANES):
            low[t] = ZERO if low[t] > ZERO and not free else low[t]
            flat[t] = ONE if high[t] == low[t] else ZERO
            best_multiplier[t] = top / (high[t] - low[t])
            best_base[t] = low[t]
            scale[t] = ONE / best_multiplier[t]
        _affine_codes(tile, best_multiplier, low, top, codes)
        _affine_error(tile, w, codes, absolute, scale, low, best)
        for c in range(steps.shape[0]):
            step = steps[c]
            for t in range(LANES):
                multiplier[t] = step / (high[t] - low[t])
            _affine_codes(tile, multiplier, low, top, codes)
            _affine_sums(tile, w, codes, sum_l, sum_l2, sum_xl)
            for t in range(LANES):
                determinant = sum_w[t] * sum_l2[t] - sum_l[t] * sum_l[t]
                s = (sum_w[t] * sum_xl[t] - sum_x[t] * sum_l[t]) / determinant
                m = (sum_l2[t] * sum_x[t] - sum_l[t] * sum_xl[t]) / determinant
                clamped = m > ZERO and not free
                new_scale[t] = sum_xl[t] / sum_l2[t] if clamped else s
                new_low[t] = ZERO if clamped else m
                sum_l[t] = determinant
            _affine_error(tile, w, codes, absolute, new_scale, new_low, error)
            for t in range(LANES):
                better = sum_l[t] > ZERO and error[t] < best[t]
                best_multiplier[t] = multiplier[t] if better else best_multiplier[t]
                best_base[t] = low[t] if better else best_base[t]
                best[t] = error[t] if better else best[t]
                scale[t] = new_scale[t] if better else scale[t]
                low[t] = new_low[t] if better else low[t]
        for t in range(LANES):
            best_multiplier[t] = ZERO if flat[t] > ZERO else best_multiplier[t]
        _affine_codes(tile, best_multiplier, best_base, top, codes)
        _store(codes, start, all_codes)
        for t in range(min(LANES, x.shape[0] - start)):
            scales[start + t] = ZERO if flat[t] > ZERO else scale[t]
            minima[start + t] = -low[t]


@compiled
def _extreme(x, extreme):
    for t in range(LANES):
        extreme[t] = ZERO
    for i in range(x.shape[0]):
        for t in range(LANES):
            extreme[t] = x[i, t] if abs(x[i, t]) > abs(extreme[t]) else extreme[t]


@compiled
def _symmetric_codes(x, multiplier, top, codes):
    for i in range(x.shape[0]):
        for t in range(LANES):
            v = (multiplier[t] * x[i, t] + MAGIC) - MAGIC
            v = v if v > -top else -top
            codes[i, t] = v if v < top - ONE else top - ONE


@compiled
def _weighted_sums(x, w, values, sum_xl, sum_l2):
    for t in range(LANES):
        sum_xl[t] = sum_l2[t] = ZERO
    for i in range(x.shape[0]):
        for t in range(LANES):
            sum_xl[t] += w[i, t] * x[i, t] * values[i, t]
            sum_l2[t] += w[i, t] * values[i, t] * values[i, t]


@compiled
def _shift_codes(codes, extreme, top):
    """From signed to stored; a sub-block of zeros has the stored codes 0."""
    for i in range(codes.shape[0]):
        for t in range(LANES):
            codes[i, t] = ZERO if abs(extreme[t]) < _EPS else codes[i, t] + top


@compiled
def _symmetric(x, weighting, given, top, steps, scales, all_codes):
    n = x.shape[1]
    tile, w, codes = _tile(n), _tile(n), _tile(n)
    extreme, scale, best, best_multiplier, multiplier, sum_xl, sum_l2, _ = _eight_lanes()
    for start in range(0, x.shape[0], LANES):
        _load(x, start, tile)
        _weigh(tile, start, weighting, given, w, sum_xl)
        _extreme(tile, extreme)
        for c in range(steps.shape[0]):
            for t in range(LANES):
                multiplier[t] = steps[c] / extreme[t]
            _symmetric_codes(tile, multiplier, top, codes)
            _weighted_sums(tile, w, codes, sum_xl, sum_l2)
            for t in range(LANES):
                s = sum_xl[t] / sum_l2[t] if sum_l2[t] != ZERO else ZERO
                gains = sum_l2[t] > ZERO and sum_xl[t] * sum_xl[t] > best[t] * sum_l2[t]
                better = gains or c == 0
                best_multiplier[t] = multiplier[t] if better else best_multiplier[t]
                scale[t] = s if better else scale[t]
                best[t] = s * sum_xl[t] if better else best[t]
        _symmetric_codes(tile, best_multiplier, top, codes)
        _shift_codes(codes, extreme, top)
        _store(codes, start, all_codes)
        for t in range(min(LANES, x.shape[0] - start)):
            scales[start + t] = ZERO if abs(extreme[t]) < _EPS else scale[t]


@compiled
def _descend(x, top, passes, scales, all_codes):
    n = x.shape[1]
    tile, squares, codes = _tile(n), _tile(n), _tile(n)
    extreme, multiplier, sum_xl, sum_l2, _, _, _, _ = _eight_lanes()
    for start in range(0, x.shape[0], LANES):
        _load(x, start, tile)
        _extreme(tile, extreme)
        for t in range(LANES):
            multiplier[t] = -top / extreme[t]
        _symmetric_codes(tile, multiplier, top, codes)
        _weigh(tile, start, SQUARED, x, squares, sum_xl)
        _weighted_sums(tile, squares, codes, sum_xl, sum_l2)
        for step in range(passes * n):
            i = step % n
            for t in range(LANES):
                v = tile[i, t]
                w = v * v
                old = codes[i, t]
                rest_xl = sum_xl[t] - w * v * old
                rest_l2 = sum_l2[t] - w * old * old
                new = (v * rest_l2 / rest_xl + MAGIC) - MAGIC
                new = new if new > -top else -top
                new = new if new < top - ONE else top - ONE
                new_xl = rest_xl + w * v * new
                new_l2 = rest_l2 + w * new * new
                gains = new_xl * new_xl * sum_l2[t] > sum_xl[t] * sum_xl[t] * new_l2
                better = (rest_xl > ZERO) & (new != old) & (new_l2 > ZERO) & gains
                codes[i, t] = new if better else old
                sum_xl[t] = new_xl if better else sum_xl[t]
                sum_l2[t] = new_l2 if better else sum_l2[t]
        _shift_codes(codes, extreme, top)
        _store(codes, start, all_codes)
        for t in range(min(LANES, x.shape[0] - start)):
            zero = abs(extreme[t]) < _EPS or not sum_l2[t] > ZERO
            scales[start + t] = ZERO if zero else sum_xl[t] / sum_l2[t]


@compiled
def _nearest(v):
    """The nearest of IQ4_VALUES: 15 compares and adds of integers, exact in float32, which vectorise."""
    value = _VALUES[0]
    for k in range(15):
        value += _STEPS[k] if v >= _BORDERS[k] else ZERO
    return value


@compiled
def _lookup(x, weighting, given, steps, scales):
    n = x.shape[1]
    tile, w, values = _tile(n), _tile(n), _tile(n)
    extreme, scale, best, multiplier, sum_xl, sum_l2, _, _ = _eight_lanes()
    for start in range(0, x.shape[0], LANES):
        _load(x, start, tile)
        _weigh(tile, start, weighting, given, w, sum_xl)
        _extreme(tile, extreme)
        for t in range(LANES):
            multiplier[t] = ONE / (extreme[t] / np.float32(127))
            scale[t] = best[t] = ZERO
        for c in range(steps.shape[0] + 1):
            if c > 0:
                for t in range(LANES):
                    multiplier[t] = steps[c - 1] / extreme[t]
            for i in range(n):
                for t in range(LANES):
                    values[i, t] = _nearest(multiplier[t] * tile[i, t])
            _lookup_sums(tile, w, values, sum_xl, sum_l2)
            for t in range(LANES):
                gains = sum_xl[t] * sum_xl[t] > best[t] * sum_l2[t] or c == 0
                better = sum_l2[t] > ZERO and gains
                scale[t] = sum_xl[t] / sum_l2[t] if better else scale[t]
                best[t] = scale[t] * sum_xl[t] if better else best[t]
        for t in range(min(LANES, x.shape[0] - start)):
            scales[start + t] = ZERO if abs(extreme[t]) < _EPS else scale[t]


@compiled
def _lookup_sums(x, w, values, sum_xl, sum_l2):
    """As _weighted_sums, but the factors come in the order in which ggml multiplies here."""
    for t in range(LANES):
        sum_xl[t] = sum_l2[t] = ZERO
    for i in range(x.shape[0]):
        for t in range(LANES):
            wl = values[i, t] * w[i, t]
            sum_xl[t] += wl * x[i, t]
            sum_l2[t] += wl * values[i, t]


@compiled
def _score(x, weighting, given, scale, minimum, low, high, table, out):
    tile, w = _tile(x.shape[1]), _tile(x.shape[1])
    d, m, inverse, error, sum_v, sum_v2, sum_vx, _ = _eight_lanes()
    for start in range(0, x.shape[0], LANES):
        _load(x, start, tile)
        _weigh(tile, start, weighting, given, w, error)
        count = min(LANES, x.shape[0] - start)
        for c in range(scale.shape[0]):
            for t in range(LANES):
                d[t] = scale[c, start + min(t, count - 1)]
                m[t] = minimum[c, start + min(t, count - 1)]
                inverse[t] = ZERO if d[t] == ZERO else ONE / d[t]
                error[t] = sum_v[t] = sum_v2[t] = sum_vx[t] = ZERO
            for i in range(x.shape[1]):
                for t in range(LANES):
                    v = (tile[i, t] + m[t]) * inverse[t]
                    if table:
                        v = _nearest(v)
                    else:
                        v = (v + MAGIC) - MAGIC
                        v = v if v > low else low
                        v = v if v < high else high
                    off = d[t] * v - m[t] - tile[i, t]
                    wv = w[i, t] * v
                    error[t] += w[i, t] * off * off
                    sum_v[t] += wv
                    sum_v2[t] += wv * v
                    sum_vx[t] += wv * tile[i, t]
            for t in range(count):
                out[0, c, start + t] = error[t]
                out[1, c, start + t] = sum_v[t]
                out[2, c, start + t] = sum_v2[t]
                out[3, c, start + t] = sum_vx[t]


def _outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0]), torch.empty(x.shape, dtype=torch.uint8)


def _told(x: Tensor, weighting: Weighting) -> tuple[int, np.ndarray]:
    """As the compiled functions take it."""
    if isinstance(weighting, Tensor):
        return GIVEN, weighting.contiguous().numpy()
    return weighting, x.numpy()


def affine(
    x: Tensor, weighting: Weighting, top: int, steps: Tensor, absolute: bool, free: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (scale, codes), minimum = _outputs(x), x.new_empty(x.shape[0])
    outputs = (scale.numpy(), minimum.numpy(), codes.numpy())
    _affine(x.numpy(), *_told(x, weighting), np.float32(top), steps.numpy(), absolute, free, *outputs)
    return scale, minimum, codes


def symmetric(x: Tensor, weighting: Weighting, top: int, steps: Tensor) -> tuple[Tensor, Tensor]:
    scale, codes = _outputs(x)
    _symmetric(x.numpy(), *_told(x, weighting), np.float32(top), steps.numpy(), scale.numpy(), codes.numpy())
    return scale, codes


def descend(x: Tensor, top: int, passes: int) -> tuple[Tensor, Tensor]:
    scale, codes = _outputs(x)
    _descend(x.numpy(), np.float32(top), passes, scale.numpy(), codes.numpy())
    return scale, codes


def lookup(x: Tensor, weighting: Weighting, steps: Tensor) -> Tensor:
    scale = x.new_empty(x.shape[0])
    _lookup(x.numpy(), *_told(x, weighting), steps.numpy(), scale.numpy())
    return scale


def score(x: Tensor, weighting: Weighting, scale: Tensor, minimum: Tensor, low: int, high: int, table: bool) -> Tensor:
    sums = x.new_empty(4, *scale.shape)
    bounds = (np.float32(low), np.float32(high), table)
    _score(x.numpy(), *_told(x, weighting), scale.numpy(), minimum.numpy(), *bounds, sums.numpy())
    return sums
