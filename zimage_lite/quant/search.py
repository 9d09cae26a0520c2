"""The searches behind ggml's K-quants and IQ4 types in torch: for any device, and the readable form of `kquants_cpu`.

A search sees sub-blocks, x: [sub-blocks, elements] float32, and finds each its scale (and minimum). It is ggml's own
when the caller passes ggml's weights and candidates. Then every float32 operation comes in ggml's order, sums element
by element, because a candidate that wins by the last bit wins; hence no torch.sum, no fused operation, and no number
divided by or into a tensor (torch multiplies by the reciprocal there, on some devices).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

# How a squared error counts: as it is; times |x|, |x| + the root mean square of the sub-block, or x^2; or times given
# weights, of the shape of x.
PLAIN, MAGNITUDE, MIXED, SQUARED, GIVEN = 0, 1, 2, 3, 4
Weighting = int | Tensor
ZERO_BELOW = 1e-15  # a sub-block of smaller values than this is zero to the searches without a minimum
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
IQ4_BORDERS = tuple((low + high) / 2 for low, high in pairwise(IQ4_VALUES))
# The borders are multiples of one half, so the cell of that width tells the code: 4 times as fast as bisection.
_FIRST_CELL, _LAST_CELL = 2 * IQ4_VALUES[0], 2 * IQ4_VALUES[-1]
_CODE_OF_CELL = tuple(sum(cell / 2 >= border for border in IQ4_BORDERS) for cell in range(_FIRST_CELL, _LAST_CELL + 1))


def steps_up(first: float, step: float, count: int, top: int) -> Tensor:
    """first + step * i + top, each operation in float32 as in ggml."""
    return step * torch.arange(count, dtype=torch.float32) + first + top


def around(top: int, step: float, count: int) -> Tensor:
    """-top, then the other steps around it in rising order."""
    i = torch.arange(-count, count + 1, dtype=torch.float32)
    return -torch.cat((torch.tensor([float(top)]), top + step * i[i != 0]))


def divide(number: float, by: Tensor) -> Tensor:
    """number / by in one rounding."""
    return torch.full_like(by, number) / by


def _ordered_sum(terms: Tensor) -> Tensor:
    """[elements, sub-blocks] -> [sub-blocks], first element first."""
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


def ordered_sum(terms: Tensor) -> Tensor:
    """[..., elements] -> [...], first element first."""
    return _ordered_sum(terms.movedim(-1, 0))


def root(x: Tensor) -> Tensor:
    """The square root, rounded once: torch's float32 one can be a bit off."""
    return x.double().sqrt_().float()


def _weights(x: Tensor, weighting: Weighting) -> Tensor:
    """x: [elements, sub-blocks] -> the same shape. weighting: a tensor is [sub-blocks, elements]."""
    if isinstance(weighting, Tensor):
        return weighting.t().contiguous()
    if weighting == PLAIN:
        return torch.ones_like(x)
    if weighting == MAGNITUDE:
        return x.abs()
    if weighting == SQUARED:
        return x * x
    mean = _ordered_sum(x * x).div_(x.shape[0])  # by 32, which is exact
    return root(mean) + x.abs()


def _stored(codes: Tensor) -> Tensor:
    return codes.to(torch.uint8).t().contiguous()


def affine(
    x: Tensor, weighting: Weighting, top: int, steps: Tensor, absolute: bool, free: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x ~ scale * code - minimum with codes 0..top: -> scale, minimum [sub-blocks], codes [sub-blocks, elements] uint8.

    Spreads the range of x over `top` codes, then over each of `steps` codes, with least squares after the rounding;
    keeps what lowers the weighted error, absolute or squared. minimum >= 0 unless it is free.
    """
    x = x.t().contiguous()
    w = _weights(x, weighting)
    sum_w, sum_x = _ordered_sum(w), _ordered_sum(w * x)
    low, high = x.amin(0), x.amax(0)
    if not free:
        low = torch.where(low > 0, 0.0, low)
    flat = high == low

    def code(multiplier: Tensor, base: Tensor) -> Tensor:
        return (multiplier * (x - base)).nan_to_num_(0.0).round_().clamp_(0, top)

    def error(codes: Tensor, scale: Tensor, base: Tensor) -> Tensor:
        off = scale * codes + base - x
        return _ordered_sum(w * (off.abs() if absolute else off * off))

    best_multiplier, best_base = divide(top, high - low), low
    scale = divide(1, best_multiplier)
    best = error(code(best_multiplier, low), scale, low)
    for step in steps.tolist():
        multiplier = divide(step, high - low)  # `low` moves with every success, as in ggml
        codes = code(multiplier, low)
        sum_l, sum_l2, sum_xl = _ordered_sum(w * codes), _ordered_sum(w * codes * codes), _ordered_sum(w * codes * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        if not free:
            new_scale = torch.where(new_low > 0, sum_xl / sum_l2, new_scale)
            new_low = torch.where(new_low > 0, 0.0, new_low)
        new = error(codes, new_scale, new_low)
        better = (determinant > 0) & (new < best)
        best_multiplier = torch.where(better, multiplier, best_multiplier)
        best_base = torch.where(better, low, best_base)
        best, scale = torch.where(better, new, best), torch.where(better, new_scale, scale)
        low = torch.where(better, new_low, low)
    codes = torch.where(flat, 0.0, code(best_multiplier, best_base))
    return torch.where(flat, 0.0, scale), -low, _stored(codes)


def _extreme(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first element of the largest magnitude of each column, and where there is none to speak of."""
    at = x.abs().argmax(0, keepdim=True)
    extreme = x.gather(0, at)[0]
    return extreme, extreme.abs() < ZERO_BELOW


def symmetric(x: Tensor, weighting: Weighting, top: int, steps: Tensor) -> tuple[Tensor, Tensor]:
    """x ~ scale * (code - top) with codes 0..2 top - 1: -> scale [sub-blocks], codes [sub-blocks, elements] uint8.

    Lays the extreme on each of `steps` (near -top) and fits the scale by weighted least squares.
    """
    x = x.t().contiguous()
    w = _weights(x, weighting)
    extreme, zero = _extreme(x)

    def code(multiplier: Tensor) -> Tensor:
        return (multiplier * x).nan_to_num_(-top).round_().clamp_(-top, top - 1)

    scale, best, best_multiplier = torch.zeros_like(extreme), torch.zeros_like(extreme), torch.zeros_like(extreme)
    for index, step in enumerate(steps.tolist()):
        multiplier = divide(step, extreme)
        codes = code(multiplier)
        sum_xl, sum_l2 = _ordered_sum(w * x * codes), _ordered_sum(w * codes * codes)
        new_scale = torch.where(sum_l2 != 0, sum_xl / sum_l2, 0.0)
        better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2) if index else ~zero
        scale, best = torch.where(better, new_scale, scale), torch.where(better, new_scale * sum_xl, best)
        best_multiplier = torch.where(better, multiplier, best_multiplier)
    return torch.where(zero, 0.0, scale), _stored(torch.where(zero, 0.0, code(best_multiplier) + top))


def descend(x: Tensor, top: int, passes: int) -> tuple[Tensor, Tensor]:
    """As `symmetric` with the weights x^2, but one code at a time: each moves where it fits the others best."""
    x = x.t().contiguous()
    w = x * x
    extreme, zero = _extreme(x)
    codes = (divide(-top, extreme) * x).nan_to_num_(-top).round_().clamp_(-top, top - 1)
    sum_xl, sum_l2 = _ordered_sum(w * x * codes), _ordered_sum(w * codes * codes)
    for _ in range(passes):
        for i in range(x.shape[0]):
            rest_xl = sum_xl - w[i] * x[i] * codes[i]
            rest_l2 = sum_l2 - w[i] * codes[i] * codes[i]
            new = (x[i] * rest_l2 / rest_xl).nan_to_num_(-top).round_().clamp_(-top, top - 1)
            new_xl, new_l2 = rest_xl + w[i] * x[i] * new, rest_l2 + w[i] * new * new
            gains = new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2
            better = (rest_xl > 0) & (new != codes[i]) & (new_l2 > 0) & gains
            codes[i] = torch.where(better, new, codes[i])
            sum_xl, sum_l2 = torch.where(better, new_xl, sum_xl), torch.where(better, new_l2, sum_l2)
    scale = torch.where(zero | ~(sum_l2 > 0), 0.0, sum_xl / sum_l2)
    return scale, _stored(torch.where(zero, 0.0, codes + top))


def lookup_codes(x: Tensor) -> Tensor:
    """The index of the nearest of IQ4_VALUES, the higher one of two equally near."""
    cell = (x * 2).floor_().clamp_(_FIRST_CELL, _LAST_CELL) - _FIRST_CELL
    return torch.tensor(_CODE_OF_CELL, dtype=torch.uint8, device=x.device)[cell.int()]


def _nearest(x: Tensor) -> Tensor:
    return torch.tensor(IQ4_VALUES, dtype=torch.float32, device=x.device)[lookup_codes(x).int()]


def lookup(x: Tensor, weighting: Weighting, steps: Tensor) -> Tensor:
    """x ~ scale * one of IQ4_VALUES: -> scale [sub-blocks]. The extreme is laid on 127, then on each of `steps`."""
    x = x.t().contiguous()
    w = _weights(x, weighting)
    extreme, zero = _extreme(x)
    scale, best = torch.zeros_like(extreme), torch.zeros_like(extreme)
    first = divide(1, extreme / torch.full_like(extreme, 127))
    for index, multiplier in enumerate([first] + [divide(step, extreme) for step in steps.tolist()]):
        values = _nearest((multiplier * x).nan_to_num_(IQ4_VALUES[0]))
        sum_xl, sum_l2 = _ordered_sum(w * values * x), _ordered_sum(w * values * values)
        better = (sum_l2 > 0) & ((sum_xl * sum_xl > best * sum_l2) | (index == 0))
        scale = torch.where(better, sum_xl / sum_l2, scale)
        best = torch.where(better, scale * sum_xl, best)
    return torch.where(zero, 0.0, scale)


def score(x: Tensor, weighting: Weighting, scale: Tensor, minimum: Tensor, low: int, high: int, table: bool) -> Tensor:
    """How well given scales fit. x: [sub-blocks, elements]; scale, minimum: [candidates, sub-blocks].

    x ~ scale * v - minimum with v the best of the integers low..high, or of IQ4_VALUES.
    -> [4, candidates, sub-blocks]: the squared error, and the sums of v, v^2 and v x, all weighted.
    """
    x = x.t().contiguous()
    w = _weights(x, weighting)
    sums = x.new_empty(4, *scale.shape)
    for index, (d, m) in enumerate(zip(scale, minimum, strict=True)):
        v = (x + m) * torch.where(d == 0, 0.0, divide(1, d))
        v = _nearest(v) if table else v.nan_to_num_(low).round_().clamp_(low, high)
        off = d * v - m - x
        for which, terms in enumerate((w * off * off, w * v, w * v * v, w * v * x)):
            sums[which, index] = _ordered_sum(terms)
    return sums
