"""References are laid out as diffusers and transformers lay them out."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from zimage_lite.errors import UserError
from zimage_lite.pictures.references import grid_of, middle, patches, require_usable, seen

SIZES = [(160, 144), (333, 77), (64, 512), (1024, 1024), (1500, 900), (2000, 2000)]


def picture(size: tuple[int, int]) -> Image.Image:
    small = np.random.default_rng(3).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size)


@pytest.mark.parametrize("size", SIZES)
def test_for_the_vision_tower(size: tuple[int, int]) -> None:
    from transformers import Siglip2ImageProcessorPil

    image = picture(size)
    truth = Siglip2ImageProcessorPil()(images=[image], return_tensors="np")
    grid = grid_of(size, 16)
    assert grid == tuple(truth["spatial_shapes"][0])
    found = patches(np.asarray(image), grid, 16)
    assert np.abs(found - truth["pixel_values"][0][: len(found)]).max() < 1e-6


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pixels", [1024 * 1024, 512 * 768])
def test_for_the_vae(size: tuple[int, int], pixels: int) -> None:
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    image, theirs = picture(size), Flux2ImageProcessor(vae_scale_factor=16)
    smaller = theirs._resize_to_target_area(image, pixels) if size[0] * size[1] > 1024 * 1024 else image
    ours = seen(np.asarray(image), pixels)
    assert np.array_equal(ours, np.asarray(smaller))
    width, height = (side // 16 * 16 for side in smaller.size)
    wanted = theirs.preprocess(smaller, height=height, width=width, resize_mode="crop")[0].permute(1, 2, 0).numpy()
    assert np.abs(middle(ours) / 127.5 - 1 - wanted).max() < 1e-6


@pytest.mark.parametrize("size", [(63, 512), (100, 801)])
def test_shapes_that_diffusers_refuses(size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=f"cat.png: a reference of this shape: got {size[0]}x{size[1]}"):
        require_usable(size, "cat.png")
