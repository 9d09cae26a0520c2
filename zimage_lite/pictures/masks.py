"""Masks: [h, w] uint8, 255 where a picture is to be drawn anew, 0 where it stays, between them by degrees."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..config import VAE_FACTOR

Box = tuple[int, int, int, int]  # left, top, right, bottom
_HALF = 128  # of 255: from here on a mask that is made hard repaints


def box_of(mask: np.ndarray) -> Box | None:
    """The smallest box with everything in it that is not 0; None if all is."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def grey(rgb: np.ndarray) -> np.ndarray:
    """[h, w, 3] uint8 -> [h, w], as bright as it looks."""
    return np.asarray(Image.fromarray(rgb).convert("L"))


def widened(mask: np.ndarray, sides: tuple[int, int, int, int]) -> np.ndarray:
    """Larger by left, top, right and bottom, where nothing is repainted."""
    left, top, right, bottom = sides
    return np.pad(mask, ((top, bottom), (left, right)))


def resized_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """To (width, height). Made smaller by the maximum, so that what is to be repainted, however thin, stays so."""
    for axis, length in enumerate(reversed(size)):
        if length < mask.shape[axis]:
            starts = np.arange(length) * mask.shape[axis] // length
            mask = np.maximum.reduceat(mask, starts, axis)
    return mask if mask.shape == size[::-1] else resized(mask, size, Image.Resampling.BILINEAR)


def hardened(mask: np.ndarray) -> np.ndarray:
    """Only 0 and 255."""
    return np.where(mask >= _HALF, 255, 0).astype(np.uint8)


def latent_mask(mask: np.ndarray) -> np.ndarray:
    """[h, w] uint8 -> [h/8, w/8] float32 in [0, 1]: the maximum of each cell, so that all latent pixels that reach what
    is to be repainted may change."""
    height, width = (side // VAE_FACTOR for side in mask.shape)
    return mask.reshape(height, VAE_FACTOR, width, VAE_FACTOR).max((1, 3)).astype(np.float32) / 255


def nearest_latent_mask(mask: np.ndarray) -> np.ndarray:
    """The same by diffusers' rule: 0 or 1, as the first pixel of each cell says."""
    return (mask[::VAE_FACTOR, ::VAE_FACTOR] >= _HALF).astype(np.float32)


def with_grey_holes(rgb: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[h, w, 3] float32: what the mask repaints becomes grey, exactly between black and white."""
    return np.where((mask >= _HALF)[..., None], np.float32(127.5), rgb)


def resized(pixels: np.ndarray, size: tuple[int, int], how: Image.Resampling = Image.Resampling.LANCZOS) -> np.ndarray:
    """[h, w] or [h, w, 3] uint8, to (width, height)."""
    return pixels if pixels.shape[1::-1] == size else np.array(Image.fromarray(pixels).resize(size, how))


def blend(under: np.ndarray, over: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[h, w, 3] uint8 each: exactly `under` where the mask is 0, exactly `over` where it is 255."""
    image = Image.fromarray(under)
    image.paste(Image.fromarray(over), mask=Image.fromarray(mask))
    return np.array(image)
