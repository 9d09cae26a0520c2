"""More picture than there was: what lies beyond the edges at first, and where it is to be painted over.

The edges are drawn out, and their detail fades within FADE pixels: a plain ground goes on as it was, and from anything
else the model gets colours and light to go on from, but no stripes to keep.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

Sides = tuple[int, int, int, int]  # left, top, right, bottom, in pixels

# Of the old picture, softly repainted along each side that grows, so that no seam shows: two of the model's tokens, and
# no more, for what people have is what they want to keep.
FEATHER = 32
FADE = 64


def extended(rgb: np.ndarray, sides: Sides) -> np.ndarray:
    """[h, w, 3] uint8 -> larger by `sides`, the picture itself unchanged in it."""
    left, top, right, bottom = sides
    height, width = rgb.shape[:2]
    out = np.empty((top + height + bottom, left + width + right, 3), np.uint8)
    out[top : top + height, left : left + width] = rgb
    inside = out[top : top + height]
    inside[:, :left] = _beyond(rgb[:, 0], left)[::-1].swapaxes(0, 1)
    inside[:, left + width :] = _beyond(rgb[:, -1], right).swapaxes(0, 1)
    out[:top] = _beyond(inside[0], top)[::-1]
    out[top + height :] = _beyond(inside[-1], bottom)
    return out


def extension_mask(size: tuple[int, int], sides: Sides, feather: int) -> np.ndarray:
    """For a picture of `size` (width, height), larger by `sides`: 255 in what is new, and in what is old, along each
    side that grew, ((feather - distance) / feather)^2 of it, but no farther than a quarter of the picture."""
    width, height = size
    left, top, right, bottom = sides
    across = np.maximum(_fading(width, left, feather), _fading(width, right, feather)[::-1])
    down = np.maximum(_fading(height, top, feather), _fading(height, bottom, feather)[::-1])
    old = np.rint(np.maximum(down[:, None], across[None]) * 255).astype(np.uint8)
    return np.pad(old, ((top, bottom), (left, right)), constant_values=255)


def _fading(length: int, grown: int, feather: int) -> np.ndarray:
    reach = min(feather, length // 4) if grown else 0
    ramp = np.zeros(length, np.float32)
    ramp[:reach] = (1 - np.arange(reach) / max(reach, 1)) ** 2
    return ramp


def _beyond(edge: np.ndarray, depth: int) -> np.ndarray:
    """edge: [n, 3] uint8 -> [depth, n, 3], away from it."""
    line = Image.fromarray(edge[None])
    blurred = np.asarray(line.filter(ImageFilter.GaussianBlur(len(edge) / 16)), np.float32)
    faded = (np.arange(1, depth + 1, dtype=np.float32) / FADE).clip(0, 1)[:, None, None]
    return np.rint(edge * (1 - faded) + blurred * faded).astype(np.uint8)
