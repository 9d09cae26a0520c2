"""Schedules against ComfyUI's values (taken from its running code), diffusers' schedulers and scipy's beta function."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from zimage_lite.config import MAX_STEPS
from zimage_lite.model.schedules import LEVELS, SCHEDULES, bend, diffusers_tail, simple, tail

SHIFTS = (0.5, 1.0, 3.0, 6.0, 12.0)
SHORTER = {"beta": 139, "beta57": 97}  # steps from which levels repeat

EIGHT_STEPS = {  # at shift 3
    "simple": "1 .954545 .9 .833333 .75 .642857 .5 .3 0",
    "normal": "1 .947543 .882788 .800837 .693793 .548046 .337972 .008929 0",
    "sgm_uniform": "1 .954694 .900359 .833998 .751121 .644686 .502985 .305009 0",
    "beta": "1 .980249 .933535 .859522 .750749 .596386 .392171 .155914 0",
    "beta57": "1 .960432 .885246 .776062 .62993 .446629 .243719 .071429 0",
    "bong_tangent": "1 .971344 .929423 .862888 .7443 .5 .213122 .069646 0",
    "linear_quadratic": "1 .99375 .9875 .98125 .975 .909375 .725 .421875 0",
    "kl_optimal": "1 .798173 .629535 .483156 .351837 .230495 .115273 .002994 0",
    "karras": "1 .555413 .292276 .144143 .065655 .027069 .009813 .002994 0",
}


def values(text: str) -> Tensor:
    return torch.tensor([float(word) for word in text.split()])


def test_every_schedule_has_known_values() -> None:
    assert EIGHT_STEPS.keys() == SCHEDULES.keys()


@pytest.mark.parametrize("name", SCHEDULES)
def test_known_values(name: str) -> None:
    """They are given with six digits, and float32 has its own half of the seventh."""
    torch.testing.assert_close(SCHEDULES[name](8, 3.0), values(EIGHT_STEPS[name]), rtol=0, atol=0.6e-6)


def test_an_odd_number_of_steps_is_halved_downwards() -> None:
    wanted = values("1 .99375 .9875 .98125 .975 .931 .8115 .6165 .346 0")
    torch.testing.assert_close(SCHEDULES["linear_quadratic"](9, 3.0), wanted, rtol=0, atol=0.6e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_falls_from_noise_to_data(name: str) -> None:
    for shift in SHIFTS:
        for steps in [*range(1, 41), 138, 139, MAX_STEPS]:
            sigmas = SCHEDULES[name](steps, shift)
            assert sigmas.dtype == torch.float32
            assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas[1:] < sigmas[:-1]).all(), (steps, shift)
            assert len(sigmas) == steps + 1 or steps >= SHORTER.get(name, math.inf), (steps, shift)


@pytest.mark.parametrize(("name", "steps"), SHORTER.items())
def test_where_beta_gets_shorter(name: str, steps: int) -> None:
    assert len(SCHEDULES[name](steps - 1, 3.0)) == steps
    assert len(SCHEDULES[name](steps, 3.0)) == steps


@pytest.mark.parametrize("shift", SHIFTS)
def test_simple_is_diffusers_rule_to_the_bit(shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    for steps in range(1, 60):
        scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(steps), device="cpu")
        assert torch.equal(simple(steps, shift), scheduler.sigmas)


@pytest.mark.parametrize("steps", [1, 2, 8, 30, 100, 500])
@pytest.mark.parametrize(("name", "a", "b"), [("beta", 0.6, 0.6), ("beta57", 0.5, 0.7)])
def test_beta_is_scipys(name: str, a: float, b: float, steps: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    quantiles = [1 - i / steps for i in range(steps)]
    levels = [1 + round(float(stats.beta.ppf(quantile, a, b)) * (LEVELS - 1)) for quantile in quantiles]
    wanted = [bend(level / LEVELS, 3.0) for level in dict.fromkeys(levels)]
    torch.testing.assert_close(SCHEDULES[name](steps, 3.0), torch.tensor([*wanted, 0.0]), rtol=0, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 2, 8, 30])
def test_karras_is_diffusers(steps: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler: Any = FlowMatchEulerDiscreteScheduler()
    wanted = scheduler._convert_to_karras(torch.tensor([1.0, bend(1 / LEVELS, 3.0)]), steps)
    torch.testing.assert_close(SCHEDULES["karras"](steps, 3.0)[:-1].double(), torch.tensor(wanted), rtol=1e-6, atol=0)


# --- Image to image


def test_a_tail_has_all_steps() -> None:
    """ComfyUI's rule: of int(8 / 0.6) = 13 steps the last 8."""
    kept = tail(simple, 8, 3.0, 0.6)
    assert torch.equal(kept, simple(13, 3.0)[5:])
    assert float(kept[0]) == pytest.approx(0.828, abs=5e-4)
    for name, schedule in SCHEDULES.items():
        for strength in (0.05, 0.3, 0.5, 0.9, 1.0):
            kept = tail(schedule, 8, 3.0, strength)
            assert len(kept) == 9 and kept[-1] == 0 and (kept[1:] < kept[:-1]).all(), (name, strength)


def test_full_strength_is_the_whole_schedule() -> None:
    for strength in (1.0, 0.99995):
        assert torch.equal(tail(simple, 8, 3.0, strength), simple(8, 3.0))
    assert torch.equal(diffusers_tail(simple, 8, 3.0, 1.0), simple(8, 3.0))


@pytest.mark.parametrize("strength", [0.0, 0.05, 0.1, 0.3, 0.55, 0.6, 0.7, 0.9, 0.95, 1.0])
def test_diffusers_tail_is_diffusers(strength: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImageImg2ImgPipeline
    from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    theirs: Any = SimpleNamespace(scheduler=scheduler)
    for steps in (1, 4, 8, 9, 10, 30, 50, 100):
        scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(steps), device="cpu")
        _, left = ZImageImg2ImgPipeline.get_timesteps(theirs, steps, strength, "cpu")
        kept = diffusers_tail(simple, steps, 3.0, strength)
        assert torch.equal(kept, scheduler.sigmas[steps - left :]), steps
        assert len(kept) == left + 1
