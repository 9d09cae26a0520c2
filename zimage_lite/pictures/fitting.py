"""A picture, or its mask, brought to a size of another shape."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .masks import resized, widened
from .outpainting import Sides, extended

FITS = ("crop", "pad", "stretch")  # the middle of it, all of it with more around it, or all of it out of shape

_LANCZOS, _BILINEAR = Image.Resampling.LANCZOS, Image.Resampling.BILINEAR


def fitted(rgb: np.ndarray, size: tuple[int, int], fit: str) -> np.ndarray:
    """[h, w, 3] uint8, to (width, height). What pads it is as in outpainting.py."""
    if fit != "pad":
        return _filled(rgb, size, fit, _LANCZOS)
    inner, sides = _padding(rgb, size)
    return extended(resized(rgb, inner, _LANCZOS), sides)


def fitted_mask(mask: np.ndarray, size: tuple[int, int], fit: str) -> np.ndarray:
    """[h, w] uint8, to (width, height). What pads the picture is not repainted."""
    if fit != "pad":
        return _filled(mask, size, fit, _BILINEAR)
    inner, sides = _padding(mask, size)
    return widened(resized(mask, inner, _BILINEAR), sides)


def _filled(pixels: np.ndarray, size: tuple[int, int], fit: str, how: Image.Resampling) -> np.ndarray:
    """All of `pixels`, or of their middle as much as has the shape of `size`."""
    if pixels.shape[1::-1] == size:
        return pixels
    height, width = pixels.shape[:2]
    if fit == "stretch":
        return resized(pixels, size, how)
    scale = max(size[0] / width, size[1] / height)
    left, top = (width - size[0] / scale) / 2, (height - size[1] / scale) / 2
    box = (max(left, 0), max(top, 0), min(width - left, width), min(height - top, height))
    return np.array(Image.fromarray(pixels).resize(size, how, box))


def _padding(pixels: np.ndarray, size: tuple[int, int]) -> tuple[tuple[int, int], Sides]:
    """The size that all of it has within `size`, and how much is missing on each side."""
    height, width = pixels.shape[:2]
    scale = min(size[0] / width, size[1] / height)
    inner = max(round(width * scale), 1), max(round(height * scale), 1)
    across, down = size[0] - inner[0], size[1] - inner[1]
    return inner, (across // 2, down // 2, across - across // 2, down - down // 2)
