"""What ControlNets are shown of ordinary pictures."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from picture_files import noise
from PIL import Image, ImageFilter

from zimage_lite.config import CONTROL_SOURCES
from zimage_lite.pictures.controls import MAKERS, MAKING_BYTES, canny, in_grey, scribble, tile


def disc(width: int, height: int, radius: float) -> np.ndarray:
    """[h, w] float: how far each pixel is inside of it, in the middle."""
    y, x = np.mgrid[:height, :width]
    return radius - np.hypot(x - width / 2 + 0.5, y - height / 2 + 0.5)


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey.astype(np.uint8)[..., None], 3, 2)


def near(marked: np.ndarray) -> np.ndarray:
    """What is at most a pixel away, too."""
    return np.asarray(Image.fromarray(np.where(marked, 255, 0).astype(np.uint8)).filter(ImageFilter.MaxFilter(3))) > 0


@pytest.mark.parametrize("kind", CONTROL_SOURCES)
@pytest.mark.parametrize("size", [(64, 48), (1, 1), (17, 5)])
def test_all_are_pictures_of_the_same_size(kind: str, size: tuple[int, int]) -> None:
    made = MAKERS[kind](noise(*size))
    assert made.shape == (size[1], size[0], 3) and made.dtype == np.uint8
    assert list(MAKERS) == list(CONTROL_SOURCES)


@pytest.mark.parametrize("kind", CONTROL_SOURCES)
def test_what_it_takes_is_planned(kind: str) -> None:
    """Of noise, which has as many edges as there can be."""
    picture = noise(192, 128)
    tracemalloc.start()
    MAKERS[kind](picture)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 192 * 128 * MAKING_BYTES


def test_edges_lie_where_the_shape_ends() -> None:
    """Thin and closed: of a disc as many pixels as a circle of steps to all eight sides, 0.90 of its length, to one of
    steps to four, 1.27."""
    inside = disc(120, 100, 30)
    edges = canny(rgb(np.where(inside > 0, 200, 40)))[..., 0] == 255
    assert np.abs(inside[edges]).max() < 1.5
    assert 0.9 < edges.sum() / (2 * np.pi * 30) < 1.27
    assert near(edges)[np.abs(inside) < 0.5].all()
    assert not canny(rgb(np.full((20, 30), 90))).any()


def test_colours_of_one_brightness_have_an_edge() -> None:
    inside = disc(120, 100, 30) > 0
    picture = np.where(inside[..., None], (222, 32, 36), (168, 48, 190)).astype(np.uint8)
    assert not canny(in_grey(picture)).any()
    assert np.array_equal(canny(picture), canny(rgb(np.where(inside, 36, 190))))


def test_edges_are_those_of_scikit_image() -> None:
    """Which is as sure of them: it smooths a little otherwise, and looks between pixels for a ridge's neighbours."""
    from skimage.feature import canny as theirs

    image = np.asarray(Image.fromarray(noise(9, 7)).convert("L").resize((180, 140), Image.Resampling.BICUBIC))
    hard = np.where(image > 128, 190, 60)
    ours = canny(rgb(hard))[..., 0] == 255
    # Its gradients are a quarter as large.
    wanted = theirs(hard.astype(float), sigma=1.0, low_threshold=25, high_threshold=50)
    assert wanted.sum() > 500
    assert near(wanted)[ours].mean() > 0.97 and near(ours)[wanted].mean() > 0.97


def test_a_weak_edge_counts_where_a_strong_one_goes_on_in_it() -> None:
    """A step that is high on the left and falls off, and one that is low everywhere."""
    falling = np.linspace(120, 20, 100)
    image = np.full((60, 100), 100.0)
    image[20:] += falling
    image[40:] += 30
    edges = canny(rgb(image))[..., 0] == 255
    assert edges[18:22, 5:60].any(0).all()  # high to begin with, joined further on
    assert not edges[38:42].any()


@pytest.mark.parametrize("dark", [False, True])
def test_strokes_are_white_on_black(dark: bool) -> None:
    lines = np.zeros((256, 512), bool)
    lines[100:102, 50:450] = True
    made = scribble(rgb(np.where(lines != dark, 20, 230)))[..., 0]
    assert set(np.unique(made)) == {0, 255}
    assert (made[98:104, 50:450] == 255).all() and not made[:90].any() and not made[110:].any()


def test_grey_is_pillows() -> None:
    picture = noise(31, 23)
    wanted = np.asarray(Image.fromarray(picture).convert("L"))
    assert all((in_grey(picture)[..., channel] == wanted).all() for channel in range(3))


def test_a_tile_has_what_is_coarse_and_nothing_that_is_fine() -> None:
    coarse = np.asarray(Image.fromarray(noise(4, 3)).resize((256, 192), Image.Resampling.BICUBIC))
    fine = np.indices((192, 256)).sum(0) % 2 * 255
    assert np.abs(tile(coarse).astype(int) - coarse).mean() < 2
    assert np.ptp(tile(rgb(fine))) <= 1
