"""Masks as boxes, at other sizes, and as the latent sees them: against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from picture_files import noise
from PIL import Image
from torch.nn.functional import interpolate, max_pool2d

from zimage_lite.pictures.masks import blend, box_of, hardened, latent_mask, nearest_latent_mask, resized_mask

MASK = noise(48, 32, 1)[..., 0]


def dot(x: int, y: int, width: int = 97, height: int = 61) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[y, x] = 255
    return mask


def test_boxes() -> None:
    assert box_of(np.zeros((5, 7), np.uint8)) is None
    assert box_of(np.ones((5, 7), np.uint8)) == (0, 0, 7, 5)
    assert box_of(np.maximum(dot(9, 50), dot(80, 7))) == (9, 7, 81, 51)


def test_latent_mask_is_the_maximum_of_each_cell() -> None:
    pooled = max_pool2d(torch.from_numpy(MASK).float()[None], 8)[0] / 255
    found = latent_mask(MASK)
    assert found.dtype == np.float32 and np.allclose(found, pooled.numpy(), atol=1e-7)


@pytest.mark.parametrize(("x", "y"), [(0, 0), (7, 7), (8, 7), (95, 47)])
def test_one_pixel_changes_one_cell(x: int, y: int) -> None:
    found = latent_mask(dot(x, y, 96, 48))
    assert found.shape == (6, 12) and found.sum() == 1 == found[y // 8, x // 8]


def test_diffusers_latent_mask_is_torchs_nearest() -> None:
    hard = torch.from_numpy(hardened(MASK)).float()[None, None] / 255
    assert np.array_equal(nearest_latent_mask(MASK), interpolate(hard, (4, 6), mode="nearest")[0, 0].numpy())


def test_hardened() -> None:
    assert hardened(np.array([0, 1, 127, 128, 255], np.uint8)).tolist() == [0, 0, 0, 255, 255]


@pytest.mark.parametrize("size", [(97, 61), (96, 60), (50, 31), (7, 5), (1, 1), (97, 3)])
def test_nothing_vanishes_from_a_smaller_mask(size: tuple[int, int]) -> None:
    """Every pixel, alone, is still there, and where it belongs."""
    for x, y in [(0, 0), (96, 60), (33, 17), (48, 30)]:
        found = resized_mask(dot(x, y), size)
        assert found.shape == size[::-1] and found.max() == 255
        left, top, right, bottom = box_of(found)
        assert left * 97 <= (x + 1) * size[0] and x * size[0] <= right * 97
        assert top * 61 <= (y + 1) * size[1] and y * size[1] <= bottom * 61
        assert np.count_nonzero(found) == 1


def test_a_larger_mask_is_pillows() -> None:
    expected = np.asarray(Image.fromarray(MASK).resize((101, 77), Image.Resampling.BILINEAR))
    assert np.array_equal(resized_mask(MASK, (101, 77)), expected)
    assert resized_mask(MASK, (48, 32)) is MASK


def test_blend() -> None:
    under, over = noise(48, 32, seed=1), noise(48, 32, seed=2)
    mask = MASK.copy()
    mask[:8], mask[8:16] = 0, 255
    found = blend(under, over, mask)
    assert np.array_equal(found[:8], under[:8]) and np.array_equal(found[8:16], over[8:16])
    parts = mask[..., None] / 255
    assert np.abs(found - (under * (1 - parts) + over * parts)).max() < 1
