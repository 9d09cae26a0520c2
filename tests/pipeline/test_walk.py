"""Samplers around a picture: what is kept is the picture at every noise level, whatever the sampler."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from zimage_lite.config import SAMPLERS, SCHEDULES, STRENGTH_MODES, GenerateOptions
from zimage_lite.errors import UserError
from zimage_lite.model import samplers, schedules
from zimage_lite.model.blending import mask_at
from zimage_lite.model.scheduler import initial_noise
from zimage_lite.pipeline.levels import as_tensor, levels_of
from zimage_lite.pipeline.walk import Image, Source, Walk

CPU = torch.device("cpu")
DRAWN = torch.full((4, 6, 8), 0.7)  # what the model of these tests always guesses


def walked(image: Image, sigmas: tuple[float, ...]) -> tuple[Tensor, list[tuple[float, Tensor]]]:
    """-> the result, and what the model saw at each noise level."""
    walk, seen = Walk(image, as_tensor(sigmas), 4, CPU), []
    while walk.result is None:
        given = walk.given()
        seen.append((walk.sigma, given))
        walk.go(given, (given - DRAWN) / walk.sigma)
    return walk.result, seen


def request(**change) -> GenerateOptions:
    return GenerateOptions("a", 64, 48, steps=6, shift=3.0, seed=5, **change)


def test_the_tables_are_those_that_the_options_name() -> None:
    assert tuple(samplers.SAMPLERS) == SAMPLERS
    assert tuple(schedules.SCHEDULES) == SCHEDULES


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_outside_a_hard_mask_nothing_changes(sampler: str) -> None:
    source, mask = torch.randn(4, 6, 8), torch.zeros(6, 8)
    mask[:, 4:] = 1
    wanted = request(sampler=sampler)
    sigmas = levels_of(wanted)
    result, seen = walked(Image(0, wanted, (64, 48), Source(source, mask)), sigmas)
    assert torch.equal(result[:, :, :4], source[:, :, :4])
    assert torch.allclose(result[:, :, 4:], DRAWN[:, :, 4:], atol=1e-5)
    noise = initial_noise(5, 4, 6, 8)
    for sigma, given in seen:
        kept = sigma * noise + (1 - sigma) * source
        assert torch.allclose(given[:, :, :4], kept[:, :, :4], atol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_is_where_it_starts_from(sampler: str) -> None:
    source, wanted = torch.randn(4, 6, 8), request(sampler=sampler)
    sigmas = levels_of(wanted, 0.5)
    assert sigmas[0] < 1 and len(sigmas) == 7
    _, seen = walked(Image(0, wanted, (64, 48), Source(source)), sigmas)
    assert torch.allclose(seen[0][1], sigmas[0] * initial_noise(5, 4, 6, 8) + (1 - sigmas[0]) * source)


def test_brighter_parts_of_a_soft_mask_change_earlier() -> None:
    mask = torch.tensor([[0.0, 0.2, 0.5, 1.0]])
    found = [mask_at(mask, sigma, 0.8)[0].tolist() for sigma in (0.8, 0.5, 0.4, 0.1)]
    assert found == [[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1]]


def test_without_a_picture_a_first_level_below_1_is_less_noise() -> None:
    wanted = request(sigmas=(0.9, 0.5, 0))
    _, seen = walked(Image(0, wanted, (64, 48)), levels_of(wanted))
    assert torch.allclose(seen[0][1], 0.9 * initial_noise(5, 4, 6, 8))


def test_noise_of_ancestral_samplers_is_the_seeds() -> None:
    wanted = request(sampler="euler_ancestral")
    image = Image(0, wanted, (64, 48))
    first, again = (walked(image, levels_of(wanted))[1] for _ in range(2))
    other = walked(Image(0, request(sampler="euler"), (64, 48)), levels_of(wanted))[1]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert not torch.allclose(first[3][1], other[3][1])


def test_levels() -> None:
    assert len(levels_of(request(schedule="beta"))) == 7
    assert levels_of(request(sampler="er_sde"))[0] < 1
    assert levels_of(request(sigmas=(1, 0.5, 0))) == (1.0, 0.5, 0.0)
    assert len(levels_of(request(strength_mode="diffusers"), 0.5)) == 4
    assert levels_of(request(sigmas=(1, 0.5, 0), sampler="er_sde"))[0] < 1


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("shift", [1e-6, 0.1, 1.0, 100.0, 1000.0])
def test_every_schedule_suits_every_sampler(sampler: str, shift: float) -> None:
    for schedule in SCHEDULES:
        wanted = GenerateOptions("a", 64, 48, steps=6, shift=shift, sampler=sampler, schedule=schedule)
        for strength in (1.0, 0.3):
            result, _ = walked(Image(0, wanted, (64, 48)), levels_of(wanted, strength))
            assert torch.allclose(result, DRAWN, atol=1e-4), (schedule, strength)


@pytest.mark.parametrize(
    ("change", "flag"),
    [({"shift": 1e12}, "--shift"), ({"shift": 1e-60}, "--shift"), ({"sigmas": (0.9, 0.9 - 1e-9, 0)}, "--sigmas")],
)
def test_levels_that_are_the_same(change: dict, flag: str) -> None:
    wanted = replace(request(), **change)
    with pytest.raises(UserError, match=f"{flag}: got .*tells apart"):
        levels_of(wanted)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_given_levels_suit_every_sampler(sampler: str) -> None:
    """Also those that need less than all noise to start from, and one step alone."""
    for sigmas in ((1, 0.5, 0), (1, 0), (0.9999, 0.2, 0), (1e-6, 0)):
        wanted = request(sampler=sampler, sigmas=sigmas)
        result, seen = walked(Image(0, wanted, (64, 48)), levels_of(wanted))
        assert result.isfinite().all() and abs(seen[0][0] - sigmas[0]) < 1e-4


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mode", STRENGTH_MODES)
def test_levels_fall_whatever_is_asked_for(schedule: str, mode: str) -> None:
    for steps, shift, strength in product((1, 2, 8, 1000), (0.1, 3.0, 100.0), (0.01, 0.6, 1.0)):
        wanted = request(schedule=schedule, strength_mode=mode)
        levels = levels_of(replace(wanted, steps=steps, shift=shift), strength)
        assert 1 < len(levels) <= steps + 1 and levels[-1] == 0
