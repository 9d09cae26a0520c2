"""Noise schedules: the sigmas that a sampler visits, from 1 (noise) to 0 (data).

A row of SCHEDULES is a pure function (steps, shift) -> [steps + 1] float32, strictly falling; where steps are many,
those of `beta` are fewer. Names and rules are those of ComfyUI and its extensions, so that a setting found there draws
the same here. `simple` is diffusers' rule; ComfyUI's picks from a table of 1000, which comes to the same where steps
divide 1000, and within 0.003 elsewhere. `shift` bends a schedule towards noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache, partial

import torch
from torch import Tensor

LEVELS = 1000  # of noise, with which the model was trained

Schedule = Callable[[int, float], Tensor]


def bend(sigma: float, shift: float) -> float:
    """Towards noise: s -> shift s / (1 + (shift - 1) s) (Esser et al., 2024, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def simple(steps: int, shift: float) -> Tensor:
    """Evenly spaced, then bent. In float32 throughout, as diffusers rounds it."""
    even = torch.linspace(1.0, 1.0 / steps, steps)
    return torch.cat([shift * even / (1 + (shift - 1) * even), torch.zeros(1)])


def normal(steps: int, shift: float) -> Tensor:
    """Evenly spaced from 1 to the least of the bent levels, then bent: so more than `simple` is."""
    return _ended(bend(sigma, shift) for sigma in _even(1.0, _least(shift), steps))


def sgm_uniform(steps: int, shift: float) -> Tensor:
    """`normal` of one more step, of which the last is left out: so the way to 0 is no shorter than the others."""
    return _ended(bend(sigma, shift) for sigma in _even(1.0, _least(shift), steps + 1)[:-1])


def beta(steps: int, shift: float, a: float, b: float) -> Tensor:
    """Levels at even quantiles of a beta distribution, dense at both ends (Lee et al., 2024, "Beta Sampling is All You
    Need"). Levels that come twice are kept once, so from 139 steps on (beta57: 97) it is shorter than steps + 1."""
    upper = _beta_distribution(a, b)
    quantiles = 1 - torch.arange(steps, dtype=torch.float64) / steps
    levels = torch.searchsorted(upper, quantiles, right=True).add(1).clamp(max=LEVELS).unique_consecutive()
    return _ended(bend(level / LEVELS, shift) for level in levels.tolist())


def bong_tangent(steps: int, shift: float) -> Tensor:
    """Two arcs of an arctangent, from 1 to a half and on to 0. Knows no shift."""
    points = steps + 2
    if steps == 1:
        return _ended([1.0])
    pivot, slope = int(0.6 * points), 0.2 * 40 / points
    first = _arc(pivot, slope, pivot, 1.0, 0.5)
    return _ended([*first[:-1], *_arc(points - pivot, slope, 0, 0.5, 0.0)[:-1]])


def linear_quadratic(steps: int, shift: float) -> Tensor:
    """The first half of the steps linear to 1 - 0.025, the others a parabola that goes on with that slope (Polyak et
    al., 2024, "Movie Gen"). Knows no shift."""
    if steps == 1:
        return _ended([1.0])
    linear, rest = steps // 2, steps - steps // 2
    slope = 0.025 / linear
    curve = (1 - 0.025 - slope * rest) / rest**2
    return _ended(1 - slope * i - curve * max(i - linear, 0) ** 2 for i in range(steps))


def kl_optimal(steps: int, shift: float) -> Tensor:
    """Evenly spaced angles, of which sigma is the tangent (Sabour et al., 2024, "Align Your Steps")."""
    return _ended(math.tan(angle) for angle in _even(math.pi / 4, math.atan(_least(shift)), steps))


def karras(steps: int, shift: float) -> Tensor:
    """Evenly spaced seventh roots (Karras et al., 2022, eq. 5)."""
    return _ended(root**7 for root in _even(1.0, _least(shift) ** (1 / 7), steps))


SCHEDULES: dict[str, Schedule] = {
    "simple": simple,
    "normal": normal,
    "sgm_uniform": sgm_uniform,
    "beta": partial(beta, a=0.6, b=0.6),
    "beta57": partial(beta, a=0.5, b=0.7),
    "bong_tangent": bong_tangent,
    "linear_quadratic": linear_quadratic,
    "kl_optimal": kl_optimal,
    "karras": karras,
}


def tail(schedule: Schedule, steps: int, shift: float, strength: float) -> Tensor:
    """Where image-to-image begins, as ComfyUI has it: the last so many steps of a schedule that is longer by
    1 / strength. strength: more than 0; 1 is the whole schedule."""
    whole = schedule(steps if strength > 0.9999 else int(steps / strength), shift)
    return whole[-(steps + 1) :]


def diffusers_tail(schedule: Schedule, steps: int, shift: float, strength: float) -> Tensor:
    """As diffusers has it: of the schedule, strength x its steps, rounded up; less than a step is [0] alone. The
    product's own rounding counts: 0.7 of 10 steps are 7, 0.55 of 100 are 56."""
    whole = schedule(steps, shift)
    there = len(whole) - 1
    skipped = int(max(there - min(there * strength, there), 0))
    return whole[skipped:]


def _least(shift: float) -> float:
    """The last level before data."""
    return bend(1 / LEVELS, shift)


def _even(first: float, last: float, count: int) -> list[float]:
    return [first + (last - first) * i / max(count - 1, 1) for i in range(count)]


def _arc(points: int, slope: float, pivot: int, first: float, last: float) -> list[float]:
    """So many points of an arctangent that falls steepest at `pivot`, scaled to run from `first` to `last`."""
    raw = [-math.atan(slope * (i - pivot)) for i in range(points)]
    return [last + (first - last) * (value - raw[-1]) / (raw[0] - raw[-1]) for value in raw]


def _ended(sigmas: Iterable[float]) -> Tensor:
    return torch.tensor([*sigmas, 0.0], dtype=torch.float64).float()


@cache
def _beta_distribution(a: float, b: float) -> Tensor:
    """[LEVELS - 1] float64: the share of a beta distribution below each middle between two of LEVELS even levels. The
    first level whose entry is above a quantile is the one that the quantile rounds to."""
    x = (torch.arange(LEVELS - 1, dtype=torch.float64) + 0.5) / (LEVELS - 1)
    whole = math.gamma(a) * math.gamma(b) / math.gamma(a + b)
    below, above = _incomplete_beta(x, a, b) / whole, 1 - _incomplete_beta(1 - x, b, a) / whole
    return torch.where(x < 0.5, below, above)


def _incomplete_beta(x: Tensor, a: float, b: float) -> Tensor:
    """The integral of t^(a - 1) (1 - t)^(b - 1) from 0 to x <= 1/2, by the binomial series of its second factor."""
    term, total = torch.ones_like(x), torch.full_like(x, 1 / a)
    for n in range(1, 60):  # each term is less than half of the last
        term = term * x * (n - b) / n
        total = total + term / (a + n)
    return x**a * total
