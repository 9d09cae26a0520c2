"""What lies beyond the edges, and what of the old picture is repainted."""

from __future__ import annotations

import numpy as np
import pytest
from picture_files import noise

from zimage_lite.pictures.outpainting import FADE, FEATHER, extended, extension_mask

SIDES = [(5, 0, 0, 0), (0, 300, 0, 0), (7, 9, 11, 13), (0, 0, 500, 1)]


@pytest.mark.parametrize("sides", [*SIDES, (0, 0, 0, 0)])
@pytest.mark.parametrize("size", [(31, 23), (1, 1), (200, 150)])
def test_the_picture_stays_inside(size: tuple[int, int], sides: tuple[int, int, int, int]) -> None:
    rgb, (left, top, right, bottom) = noise(*size), sides
    found = extended(rgb, sides)
    assert found.shape == (top + size[1] + bottom, left + size[0] + right, 3)
    assert np.array_equal(found[top : top + size[1], left : left + size[0]], rgb)


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (7, 99, 201)])
def test_a_plain_ground_goes_on(colour: tuple[int, int, int]) -> None:
    plain = np.full((37, 53, 3), colour, np.uint8)
    assert (extended(plain, (500, 3, 70, 900)) == np.array(colour)).all()


def test_detail_fades_and_colours_stay() -> None:
    rgb = noise(400, 300)
    above = extended(rgb, (0, 2 * FADE, 0, 0))[: 2 * FADE][::-1].astype(float)
    contrast = above.std(1).mean(-1)  # of each row, from the edge outwards
    assert np.abs(above[0] - rgb[0]).mean() < 3  # it begins as what it continues
    assert contrast[FADE] < contrast[0] / 4 and np.all(np.diff(contrast[:FADE]) < 0.1)
    assert np.abs(above.mean(1) - rgb[0].mean(0)).max() < 8


def test_sides_mirror_each_other() -> None:
    rgb = noise(64, 48)
    left, right = extended(rgb, (40, 0, 0, 0)), extended(rgb[:, ::-1].copy(), (0, 0, 40, 0))
    assert np.array_equal(left, right[:, ::-1])
    turned = extended(rgb.swapaxes(0, 1).copy(), (0, 40, 0, 0))
    assert np.array_equal(left, turned.swapaxes(0, 1))


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("feather", [0, 8, FEATHER, 1000])
def test_the_mask(sides: tuple[int, int, int, int], feather: int) -> None:
    """Beside the formula pixel by pixel: ComfyUI's, where its picture is large enough."""
    width, height = 200, 150
    found = extension_mask((width, height), sides, feather)
    left, top, right, bottom = sides
    assert found.shape == (top + height + bottom, left + width + right)
    inside = found[top : top + height, left : left + width]
    assert found.sum() - inside.sum(dtype=int) == 255 * (found.size - inside.size)
    y, x = np.mgrid[:height, :width]
    expected = np.zeros((height, width))
    for grown, distance, length in [
        (left, x, width), (right, width - 1 - x, width), (top, y, height), (bottom, height - 1 - y, height)
    ]:  # fmt: skip
        reach = min(feather, length // 4)
        if grown and reach:
            expected = np.maximum(expected, ((reach - distance).clip(0) / reach) ** 2)
    assert np.abs(inside - expected * 255).max() <= 0.5


def test_without_feather_nothing_old_changes() -> None:
    assert extension_mask((31, 23), (5, 5, 5, 5), 0)[5:-5, 5:-5].max() == 0
