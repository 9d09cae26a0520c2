"""Large pictures in tiles: as many passes as there are tiles, and one picture in the end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from budgeted import free, tight
from PIL import Image

from zimage_lite import GenerateOptions
from zimage_lite.model.transformer import Transformer
from zimage_lite.plan import tiles

WIDTH, HEIGHT = 144, 96


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILED_PIXELS", 64 * 64)
    monkeypatch.setattr(tiles, "_TILE", 8)
    monkeypatch.setattr(tiles, "_OVERLAP", 4)


def picture() -> Image.Image:
    noise = np.random.default_rng(1).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [free, tight])
def test_each_tile_is_a_pass(tiny: Path, exact, small_tiles, budget, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    pipeline, forward = budget(tiny), Transformer.forward

    def counting(self, latents, *rest):
        seen.extend(tuple(latent.shape[1:]) for latent in latents)
        return forward(self, latents, *rest)

    monkeypatch.setattr(Transformer, "forward", counting)
    wanted = GenerateOptions("a cat", steps=2, image=picture(), strength=0.5)
    (found,) = pipeline.generate([wanted])
    n_tiles = len(tiles.tiles_of(WIDTH, HEIGHT))
    assert n_tiles > 4 and seen == [(8, 8)] * (2 * n_tiles)
    assert tuple(found.shape) == (HEIGHT, WIDTH, 3)


@pytest.mark.slow
def test_noise_is_never_seen_in_tiles(tiny: Path, exact, small_tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = free(tiny).generate([GenerateOptions("a cat", WIDTH, HEIGHT, steps=2)])[0]
    monkeypatch.undo()
    assert torch.equal(whole, free(tiny).generate([GenerateOptions("a cat", WIDTH, HEIGHT, steps=2)])[0])


@pytest.mark.slow
def test_a_slight_change_leaves_no_seam(exact, small_tiles) -> None:
    """The demo over a plain ground: nothing at the places where tiles end that is not everywhere."""
    from zimage_lite import load

    ground = np.full((HEIGHT, WIDTH, 3), (222, 33, 36), np.uint8)
    wanted = GenerateOptions("a red background", image=ground, strength=0.05)
    (found,) = load("demo", device="cpu").generate([wanted])
    across = found.float().diff(dim=1).abs().amax(2).mean(0)
    assert across.max() < 8  # of 255
