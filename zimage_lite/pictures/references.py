"""Pictures that an Omni sees beside the prompt, laid out as diffusers' ZImageOmniPipeline does it: whole for the vision
tower, and the middle of them for the VAE.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from ..config import SIZE_MULTIPLE, VISION_PATCHES
from ..errors import UserError

MOST_PIXELS = 1024 * 1024  # larger ones are made smaller
LEAST_SIDE, MOST_RATIO = 64, 8
_FINEST, _COARSEST, _STEP = 1e-6, 100.0, 1e-5  # scales that transformers' Siglip2ImageProcessor looks among

Size = tuple[int, int]  # width and height


def require_usable(size: Size, name: str) -> None:
    """Raise UserError for a picture that is too small or too long: diffusers takes none either."""
    width, height = size
    if min(size) < LEAST_SIDE or max(size) > MOST_RATIO * min(size):
        raise UserError(
            f"{name}: a reference of this shape", got=f"{width}x{height}",
            expected=f"at least {LEAST_SIDE} pixels each way, and sides of at most 1 to {MOST_RATIO}",
        )  # fmt: skip


def seen_size(size: Size, pixels: int = MOST_PIXELS) -> Size:
    """What becomes of a picture of this size. pixels: that one has which had more than MOST_PIXELS."""
    width, height = size
    if width * height <= MOST_PIXELS:
        return size
    scale = math.sqrt(pixels / (width * height))
    return int(width * scale), int(height * scale)


def seen(rgb: np.ndarray, pixels: int = MOST_PIXELS) -> np.ndarray:
    """[h, w, 3] uint8 -> the same of the size that is seen."""
    size = seen_size((rgb.shape[1], rgb.shape[0]), pixels)
    if size == (rgb.shape[1], rgb.shape[0]):
        return rgb
    return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.LANCZOS))


def encoded_size(size: Size) -> Size:
    """Of the middle that the VAE encodes. size: that is seen."""
    width, height = (side // SIZE_MULTIPLE * SIZE_MULTIPLE for side in size)
    return width, height


def middle(rgb: np.ndarray) -> np.ndarray:
    """[h, w, 3] -> what the VAE encodes of it."""
    width, height = encoded_size((rgb.shape[1], rgb.shape[0]))
    left, top = (rgb.shape[1] - width) // 2, (rgb.shape[0] - height) // 2
    return rgb[top : top + height, left : left + width]


def grid_of(size: Size, patch: int) -> tuple[int, int]:
    """Rows and columns of patches that the vision tower sees of it: as many as there may be, by halving as transformers
    searches for them, down to the rounding."""

    def sides(scale: float) -> tuple[int, int]:
        rows, columns = (max(math.ceil(side * scale / patch), 1) for side in reversed(size))
        return rows, columns

    low, high = _FINEST, _COARSEST
    while high - low >= _STEP:
        scale = (low + high) / 2
        low, high = (scale, high) if math.prod(sides(scale)) <= VISION_PATCHES else (low, scale)
    return sides(low)


def patches(rgb: np.ndarray, grid: tuple[int, int], patch: int) -> np.ndarray:
    """[h, w, 3] uint8 -> [rows * columns, patch * patch * 3] float32 from -1 to 1; in a patch, colours run fastest."""
    rows, columns = grid
    small = Image.fromarray(rgb).resize((columns * patch, rows * patch), Image.Resampling.BILINEAR)
    values = (np.asarray(small).astype(np.float32) / 255 - 0.5) / 0.5
    return values.reshape(rows, patch, columns, patch, 3).transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1)
