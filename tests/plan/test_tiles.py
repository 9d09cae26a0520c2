"""Tiles cover a picture, overlap, and are no larger than what the model draws well."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from zimage_lite.model.blending import feathered
from zimage_lite.plan.tiles import _OVERLAP, _TILE, tiles_of

LARGE = [(2064, 2048), (3072, 2048), (2304, 2304), (8192, 784), (784, 8192), (3008, 2000), (4096, 4096)]


@pytest.mark.parametrize("size", [(64, 64), (1024, 1024), (2048, 2048), (4096, 1024)])
def test_what_the_model_can_see_is_one(size: tuple[int, int]) -> None:
    (tile,) = tiles_of(*size)
    assert (tile.top, tile.left, 8 * tile.width, 8 * tile.height) == (0, 0, *size)


@pytest.mark.parametrize("size", LARGE)
def test_they_cover_all_and_overlap(size: tuple[int, int]) -> None:
    width, height = (side // 8 for side in size)
    tiles = tiles_of(*size)
    assert {(tile.height, tile.width) for tile in tiles} == {(tiles[0].height, tiles[0].width)}
    assert max(tiles[0].height, tiles[0].width) <= _TILE
    assert tiles[0].height % 2 == tiles[0].width % 2 == 0  # whole patches
    for starts, length, side in (
        (sorted({tile.top for tile in tiles}), tiles[0].height, height),
        (sorted({tile.left for tile in tiles}), tiles[0].width, width),
    ):
        assert starts[0] == 0 and starts[-1] + length == side
        assert all(a + length - b >= _OVERLAP for a, b in pairwise(starts))


@pytest.mark.parametrize("size", LARGE)
def test_pieces_of_one_image_become_it_again(size: tuple[int, int]) -> None:
    width, height = (side // 8 for side in size)
    whole, tiles = torch.rand(2, height, width), tiles_of(*size)
    pieces = [whole[:, t.top : t.top + t.height, t.left : t.left + t.width] for t in tiles]
    joined = feathered(pieces, [(t.top, t.left) for t in tiles], height, width)
    assert (joined - whole).abs().max() <= 1e-6


def test_no_edge_shows() -> None:
    """Two tiles that disagree: from one to the other in even steps, none larger than one part of their overlap."""
    pieces = [torch.zeros(1, 4, 20), torch.ones(1, 4, 20)]
    row = feathered(pieces, [(0, 0), (0, 10)], 4, 30)[0, 0]
    assert row[:10].eq(0).all() and row[20:].eq(1).all()
    assert row.diff().max() <= 0.1 and row.diff().min() >= 0
