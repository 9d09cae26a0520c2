"""Samplers: how x gets from noise (sigma 1) to data (sigma 0), given a model that guesses the clean latent x0.

A sampler is a coroutine. It yields (x, i), which asks for the model's guess of x0 from x at sigmas[i], is sent that
guess, and returns the final x. So it knows neither model nor device nor mask, and whoever drives it may stop it, show
the guess, or change it, which is how inpainting works with all of them:

    steps = SAMPLERS["euler"].steps(x, sigmas, noise)
    x, i = next(steps)
    while True:
        x, i = steps.send(guess(x, sigmas[i]))    # StopIteration.value is the final x

x, and what is sent and drawn, are float32 of one shape, any; what is sent must not be changed afterwards. sigmas are
[steps + 1], strictly falling to 0. They are turned into Python's float64: the logarithm of a ratio near 1 has too few
digits in float32. On the way, x = sigma noise + (1 - sigma) x0, and the updates are those of ComfyUI.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .schedules import bend

Noise = Callable[[], Tensor]  # the next draw, standard normal
Steps = Generator[tuple[Tensor, int], Tensor, Tensor]

_NEARLY_ONE = 1 - 1e-4  # before it is bent: the first sigma where 1 has no finite log-SNR
_BELOW_ONE = 1 - 2**-24  # the float32 next to 1


def euler(x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """Along the line from x to the guess."""
    for i, (sigma, after) in enumerate(pairwise(sigmas.tolist())):
        x0 = yield x, i
        x = _towards(x0, x, after / sigma)
    return x


def heun(x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """Along the mean of the slopes here and where Euler's step ends (Karras et al., 2022, algorithm 1)."""
    for i, (sigma, after) in enumerate(pairwise(sigmas.tolist())):
        x0 = yield x, i
        there = _towards(x0, x, after / sigma)
        if after:
            x0_there = yield there, i + 1
            slope = (x - x0) / sigma + (there - x0_there) / after
            there = x + (after - sigma) / 2 * slope
        x = there
    return x


def dpmpp_2m(x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """DPM-Solver++(2M): the guess goes on in log sigma as it changed in the last step (Lu et al., 2022, algorithm 2).
    First and last step are Euler's."""
    old, h_last = x, 0.0
    for i, (sigma, after) in enumerate(pairwise(sigmas.tolist())):
        x0 = yield x, i
        h = _log_ratio(sigma, after)
        middle = x0 + h / (2 * h_last) * (x0 - old) if i and after else x0
        x = _towards(middle, x, after / sigma)
        old, h_last = x0, h
    return x


def res_multistep(x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """The refined exponential solver of second order, with the last guess for its second stage (Zhang et al., 2023).
    First and last step are Euler's."""
    old, h_last = x, 0.0
    for i, (sigma, after) in enumerate(pairwise(sigmas.tolist())):
        x0 = yield x, i
        h = _log_ratio(sigma, after)
        if i and after:
            phi1 = -math.expm1(-h) / h
            of_old = (1 - phi1) / -h_last  # phi2 / c2, where c2 = -h_last / h and phi2 = (1 - phi1) / h
            x = after / sigma * x + h * ((phi1 - of_old) * x0 + of_old * old)
        else:
            x = _towards(x0, x, after / sigma)
        old, h_last = x0, h
    return x


def euler_ancestral(x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """Euler's step to less noise than is asked for, and fresh noise for the rest. The form for flows: signal shrinks
    as noise is added, so that sigma noise + (1 - sigma) x0 stays true."""
    for i, (sigma, after) in enumerate(pairwise(sigmas.tolist())):
        x0 = yield x, i
        below = after * after / sigma
        x = _towards(x0, x, below / sigma)
        if after:
            shrunk = (1 - after) / (1 - below)
            x = shrunk * x + math.sqrt(after**2 - (below * shrunk) ** 2) * noise()
    return x


def lcm(x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """The guess, with fresh noise for all that is left (Luo et al., 2023, "Latent Consistency Models")."""
    for i, after in enumerate(sigmas.tolist()[1:]):
        x0 = yield x, i
        x = _towards(x0, noise(), after) if after else x0
    return x


def dpmpp_2m_sde(x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """SDE-DPM-Solver++(2M) by the midpoint rule (Lu et al., 2022), in half the log-SNR. sigmas < 1."""
    old, h_last = x, 0.0
    for i, (sigma, after) in enumerate(pairwise(sigmas.tolist())):
        x0 = yield x, i
        if not after:
            return x0
        h = math.log((1 - after) / after) - math.log((1 - sigma) / sigma)
        gain = (1 - after) * -math.expm1(-2 * h)
        middle = x0 + h / (2 * h_last) * (x0 - old) if i else x0
        x = after / sigma * math.exp(-h) * x + gain * middle
        x = x + after * math.sqrt(-math.expm1(-2 * h)) * noise()
        old, h_last = x0, h
    return x


def er_sde(x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """The extended reverse-time SDE with three stages (Cui et al., 2023), in lambda = sigma / (1 - sigma).
    Divided differences of the last three guesses take their derivatives' place. sigmas < 1."""
    lambdas, guesses = [sigma / (1 - sigma) for sigma in sigmas.tolist()], list[Tensor]()
    for i, (sigma, after) in enumerate(pairwise(sigmas.tolist())):
        x0 = yield x, i
        if not after:
            return x0
        guesses = [*guesses[-2:], x0]
        here, there = lambdas[i : i + 2]
        kept = _er_scale(there) / _er_scale(here)
        first, second = _er_integrals(here, there)
        mean = (1 - kept) * x0
        if i > 0:
            slope = (x0 - guesses[-2]) / (here - lambdas[i - 1])
            mean = mean + (there - here + first) * slope
        if i > 1:
            slope_before = (guesses[-2] - guesses[-3]) / (lambdas[i - 1] - lambdas[i - 2])
            curve = (slope - slope_before) / ((here - lambdas[i - 2]) / 2)
            mean = mean + ((there - here) ** 2 / 2 + second) * curve
        fresh = math.sqrt(max(there**2 - (here * kept) ** 2, 0.0)) * noise()
        x = (1 - after) * (kept / (1 - sigma) * x + mean + fresh)
    return x


def _towards(x0: Tensor, x: Tensor, left: float) -> Tensor:
    """x0 + left (x - x0), exact where nothing is left: x0."""
    return torch.lerp(x0, x, left)


def _log_ratio(sigma: float, after: float) -> float:
    return math.log(sigma / after) if after else math.inf


def _er_scale(noise: float) -> float:
    """How much noise the SDE adds where lambda is so: its authors' choice."""
    return noise * (math.exp(noise**0.3) + 10)


def _er_integrals(here: float, there: float) -> tuple[float, float]:
    """Of s(there) / s(l) and of s(there) (l - here) / s(l), where s is the scale and l runs from `there` up to `here`:
    by rectangles of their left-hand values, as many as the authors take."""
    width = (here - there) / 200
    points = [there + k * width for k in range(200)]
    weights = [width * _er_scale(there) / _er_scale(point) for point in points]
    return sum(weights), sum(weight * (point - here) for weight, point in zip(weights, points, strict=True))


@dataclass(frozen=True)
class Sampler:
    """draws: whether it asks for noise. snr: whether it needs a finite log-SNR, so a first sigma below 1."""

    steps: Callable[[Tensor, Tensor, Noise], Steps]
    draws: bool = False
    snr: bool = False
    evaluations_per_step: int = 1  # but for the last step, which takes one


SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(euler),
    "heun": Sampler(heun, evaluations_per_step=2),
    "res_multistep": Sampler(res_multistep),
    "dpmpp_2m": Sampler(dpmpp_2m),
    "euler_ancestral": Sampler(euler_ancestral, draws=True),
    "lcm": Sampler(lcm, draws=True),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde, draws=True, snr=True),
    "er_sde": Sampler(er_sde, draws=True, snr=True),
}


def evaluations(name: str, steps: int) -> int:
    """How often the sampler asks for a guess."""
    return SAMPLERS[name].evaluations_per_step * (steps - 1) + 1


def asked_at(name: str, sigmas: Tensor) -> list[int]:
    """The places in `sigmas` at which it asks, in order."""
    nothing = torch.zeros(())
    steps = SAMPLERS[name].steps(nothing, sigmas, lambda: nothing)
    found, place = list[int](), next(steps)[1]
    while True:
        found.append(place)
        try:
            place = steps.send(nothing)[1]
        except StopIteration:
            return found


def first_sigma(name: str, sigmas: Tensor, shift: float) -> Tensor:
    """The schedule as the sampler can take it: where it needs a finite log-SNR, a first sigma of 1 becomes a little
    less, as far as `shift` bends 1 - 0.0001, whether or not the schedule itself knows a shift. Never less than halfway
    to the second sigma, so that the schedule still falls. Noise is mixed in by the sigma that comes out."""
    if not SAMPLERS[name].snr or len(sigmas) < 2 or sigmas[0] < 1:
        return sigmas
    first = min(max(bend(_NEARLY_ONE, shift), (1 + float(sigmas[1])) / 2), _BELOW_ONE)
    return torch.cat([sigmas.new_tensor([first]), sigmas[1:]])
