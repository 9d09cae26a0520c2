"""What is left to chance: the same for the same seed and step, and spread as it is meant."""

from __future__ import annotations

import itertools

import pytest
import torch

from zimage_lite.config import TrainOptions
from zimage_lite.train.draws import Draws


def test_every_picture_comes_once_before_any_comes_again() -> None:
    draws = Draws(TrainOptions(batch=2), pictures=5)
    order = list(itertools.chain.from_iterable(draws.chosen(step) for step in range(10)))
    epochs = [order[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs) and len(set(map(tuple, epochs))) > 1


def test_what_is_preserved_takes_turns() -> None:
    draws = Draws(TrainOptions(batch=1), pictures=3, preserved=7)
    order = list(itertools.chain.from_iterable(draws.chosen(step) for step in range(14)))
    assert all((place >= 3) == bool(turn % 2) for turn, place in enumerate(order))
    assert sorted(order[1::2]) == list(range(3, 10))


@pytest.mark.parametrize(("timesteps", "shift"), [("sigmoid", 1.0), ("uniform", 1.0), ("uniform", 3.0)])
def test_noise_levels_are_spread_as_said(timesteps: str, shift: float) -> None:
    """Their quartiles: those of sigmoid(N(0, 1)) are sigmoid(-0.6745), 1/2 and sigmoid(0.6745). Of 4000 draws a
    quartile is known to about 0.01."""
    draws = Draws(TrainOptions(batch=250, timesteps=timesteps, shift=shift), 9)
    sigmas = torch.tensor([draws.sigmas(step) for step in range(16)]).flatten()
    quarters = torch.tensor([0.25, 0.5, 0.75])
    plain = torch.tensor([-0.6745, 0.0, 0.6745]).sigmoid() if timesteps == "sigmoid" else quarters
    wanted = shift * plain / (1 + (shift - 1) * plain)
    assert torch.allclose(sigmas.quantile(quarters), wanted, atol=0.04)
    assert sigmas.min() >= 0 and sigmas.max() <= 1


def test_a_step_draws_what_it_drew() -> None:
    latents = [torch.zeros(4, 2, 2), torch.zeros(4, 3, 2)]
    one, two, other = (Draws(TrainOptions(seed=seed, batch=2), 5) for seed in (1, 1, 2))
    for step in (7, 0):
        assert all(map(torch.equal, one.noises(step, latents), two.noises(step, latents)))
        assert one.sigmas(step) == two.sigmas(step) != other.sigmas(step)
    assert not torch.equal(one.noises(0, latents)[0], one.noises(1, latents)[0])
