"""Pictures of one shape in sizes of another: what is kept, and that nothing is drawn out unless it is to be."""

from __future__ import annotations

import numpy as np
import pytest
from picture_files import noise
from PIL import Image, ImageOps

from zimage_lite.pictures.fitting import FITS, fitted, fitted_mask

SIZES = [(64, 64), (48, 96), (96, 48), (31, 23), (62, 46), (16, 16), (200, 17)]


def circle(width: int, height: int, radius: int) -> np.ndarray:
    """[h, w] bool, in the middle."""
    y, x = np.mgrid[:height, :width]
    return (x - width / 2 + 0.5) ** 2 + (y - height / 2 + 0.5) ** 2 < radius**2


@pytest.mark.parametrize("size", SIZES)
def test_stretch_and_crop_are_pillows(size: tuple[int, int]) -> None:
    rgb = noise(31, 23)
    image = Image.fromarray(rgb)
    assert np.array_equal(fitted(rgb, size, "stretch"), np.asarray(image.resize(size, Image.Resampling.LANCZOS)))
    expected = np.asarray(ImageOps.fit(image, size, Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(fitted(rgb, size, "crop") - expected).max() <= 1  # the same box, but for how its numbers round


@pytest.mark.parametrize("size", SIZES)
def test_pad_keeps_all_of_it_in_the_middle(size: tuple[int, int]) -> None:
    rgb = noise(31, 23)
    inner = ImageOps.contain(Image.fromarray(rgb), size, Image.Resampling.LANCZOS)
    left, top = (size[0] - inner.width) // 2, (size[1] - inner.height) // 2
    found = fitted(rgb, size, "pad")
    assert found.shape == (*size[::-1], 3)
    assert np.array_equal(found[top : top + inner.height, left : left + inner.width], np.asarray(inner))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", SIZES)
def test_a_mask_goes_where_its_picture_goes(fit: str, size: tuple[int, int]) -> None:
    inside = circle(60, 40, 15)
    picture = np.repeat(np.where(inside, 255, 0).astype(np.uint8)[..., None], 3, 2)
    mask = np.where(inside, 255, 0).astype(np.uint8)
    found, seen = fitted_mask(mask, size, fit), fitted(picture, size, fit)[..., 0]
    assert found.shape == seen.shape == size[::-1]
    assert np.abs(found.astype(int) - seen).mean() < 6  # only their edges are filtered in two ways


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("size", [(64, 64), (48, 96), (200, 100)])
def test_circles_stay_round(fit: str, size: tuple[int, int]) -> None:
    found = fitted_mask(np.where(circle(60, 40, 9), 255, 0).astype(np.uint8), size, fit) > 127
    rows, columns = found.any(1).sum(), found.any(0).sum()
    assert abs(int(rows) - int(columns)) <= 2


@pytest.mark.parametrize("fit", FITS)
def test_its_own_size_changes_nothing(fit: str) -> None:
    rgb = noise(31, 23)
    assert np.array_equal(fitted(rgb, (31, 23), fit), rgb)
    assert np.array_equal(fitted_mask(rgb[..., 0], (31, 23), fit), rgb[..., 0])


@pytest.mark.parametrize("fit", FITS)
def test_thin_ones(fit: str) -> None:
    for width, height in [(1, 1), (300, 1), (1, 300), (3000, 2)]:
        assert fitted(noise(width, height), (64, 48), fit).shape == (48, 64, 3)
