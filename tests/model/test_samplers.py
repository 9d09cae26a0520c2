"""Samplers against ComfyUI's values (taken from its running code), diffusers' schedulers, and flows whose end is known.

The flows: if x0 is normal with mean m and deviation s in every pixel, the best guess of x0 is linear in x, and the
flow from noise z ends at m + s z. If x0 is -1 or 1, it is tanh((1 - sigma) x / sigma^2), and the flow ends there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from zimage_lite.model.samplers import SAMPLERS, evaluations, first_sigma
from zimage_lite.model.schedules import SCHEDULES

Guess = Callable[[Tensor, float], Tensor]

DETERMINISTIC = [name for name, sampler in SAMPLERS.items() if not sampler.draws]
RANDOM = [name for name, sampler in SAMPLERS.items() if sampler.draws]
MEAN, DEVIATION = 0.4, 0.3


def sampled(
    name: str, x: Tensor, sigmas: Tensor, guess: Guess, shift: float = 3.0, noise: Callable[[], Tensor] | None = None
) -> tuple[Tensor, list[tuple[Tensor, int]]]:
    """The final x, and all that was asked."""
    sigmas = first_sigma(name, sigmas, shift)
    steps = SAMPLERS[name].steps(x, sigmas, noise or (lambda: torch.randn(x.shape)))
    asked = [next(steps)]
    while True:
        x, i = asked[-1]
        try:
            asked.append(steps.send(guess(x, float(sigmas[i]))))
        except StopIteration as end:
            return end.value, asked


def normal_data(x: Tensor, sigma: float) -> Tensor:
    """E[x0 | x] for x0 ~ N(MEAN, DEVIATION^2) and x = sigma noise + (1 - sigma) x0."""
    variance = ((1 - sigma) * DEVIATION) ** 2 + sigma**2
    return MEAN + DEVIATION**2 * (1 - sigma) / variance * (x - (1 - sigma) * MEAN)


def two_points(x: Tensor, sigma: float) -> Tensor:
    """E[x0 | x] for x0 = -1 or 1, equally likely."""
    return torch.tanh((1 - sigma) / sigma**2 * x)


# --- ComfyUI's

SIGMAS = torch.tensor([1, 0.937781, 0.857326, 0.75, 0.600719, 0.375562, 0])
KNOWN = {  # x at 0.375562, before the last step, and the final x
    "euler": (0.720641, 0.36026),
    "heun": (0.716873, 0.359083),
    "dpmpp_2m": (0.722924, 0.360972),
    "res_multistep": (0.723032, 0.361006),
    "euler_ancestral": (0.971703, 0.438646),
    "dpmpp_2m_sde": (0.855371, 0.402325),
    "er_sde": (1.089486, 0.47542),
}


def curved(x: Tensor, sigma: float) -> Tensor:
    return 0.5 * x * (1 - sigma) + 0.25 * sigma**2 + 0.1


@pytest.mark.parametrize("name", KNOWN)
def test_known_values(name: str) -> None:
    """Six digits are given; a dozen float32 roundings of numbers up to 1.3 may turn the last one."""
    final, asked = sampled(name, torch.tensor([1.3]), SIGMAS, curved, noise=lambda: torch.ones(1))
    before, index = asked[-1]
    assert index == 5
    torch.testing.assert_close(torch.cat([before, final]), torch.tensor(KNOWN[name]), rtol=0, atol=2e-6)


# --- diffusers'


def their_path(scheduler: Any, x: Tensor, **options: Any) -> list[Tensor]:
    """x at each evaluation of the model `curved`, and the final one."""
    path = [x]
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        velocity = (x - curved(x, float(sigma))) / sigma
        x = scheduler.step(velocity, timestep, x, **options).prev_sample
        path.append(x)
    return path


def assert_same_path(name: str, scheduler: Any, **options: Any) -> None:
    """Both draw from a generator of the same seed."""
    x = torch.randn(2, 3, 4)
    generator = torch.Generator().manual_seed(1)
    final, asked = sampled(
        name, x, scheduler.sigmas.unique_consecutive(), curved, noise=lambda: torch.randn(x.shape, generator=generator)
    )
    theirs = their_path(scheduler, x, **options)
    ours = [*(x for x, _ in asked), final]
    assert len(ours) == len(theirs)
    for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=lambda text, i=i: f"evaluation {i}: {text}")


def test_euler_is_diffusers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    assert_same_path("euler", scheduler)


def test_heun_is_diffusers() -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler

    scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    assert_same_path("heun", scheduler)


def test_lcm_is_diffusers() -> None:
    from diffusers import FlowMatchLCMScheduler

    scheduler = FlowMatchLCMScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    assert_same_path("lcm", scheduler, generator=torch.Generator().manual_seed(1))


def test_dpmpp_2m_sde_is_diffusers() -> None:
    """Its own schedule for flows starts below 1."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", solver_order=2, solver_type="midpoint", prediction_type="flow_prediction",
        use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero",
    )  # fmt: skip
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(0)
    assert_same_path("dpmpp_2m_sde", scheduler, generator=torch.Generator().manual_seed(1))


# --- Flows that are known


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_it_converges_to_the_flows_end(name: str) -> None:
    """Euler is off by 2.2 % after 200 steps, the others by 0.5 % at most; where data are points, nobody is."""
    x, sigmas = torch.randn(1000), SCHEDULES["simple"](200, 3.0)
    final, _ = sampled(name, x, sigmas, normal_data)
    error = (final - MEAN - DEVIATION * x).abs() / (DEVIATION * x.abs().clamp(min=1))
    assert error.max() < (0.025 if name == "euler" else 0.006)
    final, _ = sampled(name, x, sigmas, two_points)
    assert torch.equal(final, x.sign())


@pytest.mark.parametrize("name", RANDOM)
def test_it_converges_to_the_data(name: str) -> None:
    """The mean of 20,000 draws deviates by 1 / sqrt(20000) = 0.007 of one's deviation, their deviation by 0.005."""
    x, sigmas = torch.randn(20_000), SCHEDULES["simple"](200, 3.0)
    final, _ = sampled(name, x, sigmas, two_points)
    assert torch.equal(final.abs(), torch.ones_like(x))
    assert abs(final.mean()) < 5 * 0.007
    if name == "lcm":  # trusts each guess to be a draw, not a mean: exact only where data are points
        return
    final, _ = sampled(name, x, sigmas, normal_data)
    assert abs(final.mean() - MEAN) < 5 * 0.007 * DEVIATION
    bias = 0.063 if name == "euler_ancestral" else 0.01  # what 200 steps leave: of first order, and of higher
    assert abs(final.std() / DEVIATION - 1) < bias + 5 * 0.005


def test_the_ancestors_bias_goes_with_the_steps() -> None:
    x = torch.randn(20_000)
    biases = []
    for steps in (100, 400):
        final, _ = sampled("euler_ancestral", x, SCHEDULES["simple"](steps, 3.0), normal_data)
        biases.append(float(1 - final.std() / DEVIATION))
    assert biases[0] / biases[1] == pytest.approx(4, rel=0.5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("res_multistep", 2)])
def test_order_of_convergence(name: str, order: int) -> None:
    """Twice the steps divide the error by 2^order, on the way to sigma 0.2: of the last steps to 0, which are Euler's
    and long in log sigma, a term of N^-2 log N is left. In float64, so that rounding does not hide it."""
    x, errors = torch.tensor([1.5], dtype=torch.float64), []
    for steps in (200, 400, 800):
        end, _ = sampled(name, x, torch.linspace(1, 0.2, steps + 1, dtype=torch.float64), normal_data)
        errors.append(float((end - 0.8 * MEAN - math.hypot(0.8 * DEVIATION, 0.2) * x).abs()))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.06)


# --- What all have in common


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_any_number_of_steps_of_any_schedule(name: str, schedule: str) -> None:
    x = torch.randn(2, 3, 4)
    for steps in (1, 2, 3, 8, 30):
        for shift in (0.5, 3.0, 12.0):
            draws: list[Tensor] = []
            guesses: list[Tensor] = []

            def noise(draws: list[Tensor] = draws) -> Tensor:
                draws.append(torch.randn(x.shape))
                return draws[-1]

            def guess(x: Tensor, sigma: float, guesses: list[Tensor] = guesses) -> Tensor:
                assert x.dtype == torch.float32 and x.shape == (2, 3, 4) and x.isfinite().all()
                guesses.append(normal_data(x, sigma))
                return guesses[-1]

            final, asked = sampled(name, x, SCHEDULES[schedule](steps, shift), guess, shift, noise)
            assert len(asked) == evaluations(name, steps)
            assert torch.equal(asked[0][0], x) and asked[0][1] == 0
            assert torch.equal(final, guesses[-1])  # the last step takes the guess as it is
            assert len(draws) == (steps - 1 if SAMPLERS[name].draws else 0)


def test_what_it_asks() -> None:
    """Where: each step's beginning, and Heun where the step ends."""
    sigmas = SCHEDULES["simple"](4, 3.0)
    for name in SAMPLERS:
        _, asked = sampled(name, torch.randn(3), sigmas, curved)
        assert [index for _, index in asked] == ([0, 1, 1, 2, 2, 3, 3] if name == "heun" else [0, 1, 2, 3])


def test_euler_is_a_step_along_the_velocity() -> None:
    x, velocity = torch.randn(16, 8, 8), torch.randn(16, 8, 8)
    for schedule in SCHEDULES.values():
        sigmas = schedule(8, 3.0)
        for i in range(8):
            steps = SAMPLERS["euler"].steps(x, sigmas[i : i + 2], lambda: x)
            next(steps)
            with pytest.raises(StopIteration) as end:
                steps.send(x - sigmas[i] * velocity)
            wanted = x + (sigmas[i + 1] - sigmas[i]) * velocity
            torch.testing.assert_close(end.value.value, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", RANDOM)
def test_the_noise_decides(name: str) -> None:
    x, sigmas = torch.randn(100), SCHEDULES["simple"](8, 3.0)

    def drawn(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sampled(name, x, sigmas, normal_data, noise=lambda: torch.randn(100, generator=generator))[0]

    assert torch.equal(drawn(1), drawn(1))
    assert (drawn(1) - drawn(2)).abs().mean() > 0.1 * DEVIATION


# --- The first sigma


def test_only_what_needs_a_log_snr_starts_below_one() -> None:
    sigmas = SCHEDULES["simple"](8, 3.0)
    for name in SAMPLERS:
        first = first_sigma(name, sigmas, 3.0)
        assert torch.equal(first[1:], sigmas[1:])
        assert float(first[0]) == (pytest.approx(0.999967, abs=6e-7) if name in ("dpmpp_2m_sde", "er_sde") else 1)
        assert torch.equal(first_sigma(name, sigmas[1:], 3.0), sigmas[1:])  # image to image


@pytest.mark.parametrize("shift", [1e-3, 1.0, 6.0, 1e5])
def test_it_still_falls(shift: float) -> None:
    for schedule in ("simple", "linear_quadratic"):
        for steps in (1, 8, 1000):
            sigmas = SCHEDULES[schedule](steps, min(shift, 12.0))
            first = first_sigma("er_sde", sigmas, shift)
            assert sigmas[1] < first[0] < 1
