"""Pixels of any depth and kind as 8 bits of sRGB, and what covers how much.

White is 1 in floats, the largest number in whole ones. What lies outside is clipped, and what is no number is black.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

from ..errors import UserError

_BAND_PIXELS = 1 << 20  # converted at a time, so that copies are small
_SAME = 2  # of 255: profiles of sRGB differ by so much in how they round
_DEEP = ("I", "F")  # modes of more than 8 bits, beside those that begin with I;16
_PLAIN = ("L", "RGB", "CMYK", "LAB")  # in which a profile can describe colours
_GREY = ("1", "L", "LA", "La")

# EXIF's orientations: which of them begin at the bottom of what is upright, which at its right, and which store its
# columns as rows.
_FROM_BELOW, _FROM_RIGHT, _LYING = (3, 4, 7, 8), (2, 3, 6, 7), (5, 6, 7, 8)

Convert = Callable[[Image.Image], Image.Image]


def converted(image: Image.Image, orientation: int = 1) -> tuple[np.ndarray, np.ndarray | None]:
    """A loaded picture of any of Pillow's modes -> [h, w, 3] uint8 sRGB by its profile, and alpha [h, w] uint8, None if
    nothing is transparent; both turned upright. Takes these 4 bytes a pixel beside the picture."""
    width, height = image.size
    shape = (width, height) if orientation in _LYING else (height, width)
    rgb = np.empty((*shape, 3), np.uint8)
    alpha = np.empty(shape, np.uint8) if image.has_transparency_data else None
    white, to_srgb = _white_of(image), None
    rows = max(_BAND_PIXELS // width, 1)
    for top in range(0, height, rows):
        here = slice(top, top + rows)
        colours, opacity = _parted(image.crop((0, top, width, min(top + rows, height))), white)
        to_srgb = to_srgb or _to_srgb(colours.mode, image.info.get("icc_profile"))
        _as_stored(rgb, orientation)[here] = np.asarray(to_srgb(colours))
        if alpha is not None:
            _as_stored(alpha, orientation)[here] = 255 if opacity is None else np.asarray(opacity)
    return rgb, None if alpha is None or alpha.min() == 255 else alpha


def _as_stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """A view of it as a camera that was held so stores it. orientation: as EXIF counts; what is none is 1."""
    down, across = -1 if orientation in _FROM_BELOW else 1, -1 if orientation in _FROM_RIGHT else 1
    turned = upright[::down, ::across]
    return turned.swapaxes(0, 1) if orientation in _LYING else turned


def eight_bit(array: np.ndarray, white: int = 65535) -> np.ndarray:
    """Booleans, uint8, other whole numbers up to `white`, or floats up to 1 -> uint8 of the same shape."""
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "b":
        return array.astype(np.uint8) * 255
    scale = 1 if array.dtype.kind == "f" else white
    parts = np.nan_to_num(array.astype(np.float64) / scale, nan=0, posinf=1, neginf=0)
    return np.rint(parts.clip(0, 1) * 255).astype(np.uint8)


def from_array(array: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """[h, w], [h, w, 3] or [h, w, 4], of booleans, uint8, uint16 or floats -> as `converted`; all copied."""
    planes = array[..., None] if array.ndim == 2 else array
    known = planes.dtype in (np.uint8, np.uint16) or planes.dtype.kind in "bf"
    if not known or planes.ndim != 3 or planes.shape[2] not in (1, 3, 4):
        expected = "a path, bytes, a picture of Pillow's, or [height, width, 3] of uint8 or of floats from 0 to 1"
        raise UserError(name, got=f"{array.dtype} of shape {array.shape}", expected=expected)
    if planes.dtype.kind == "f" and np.isnan(planes).any():  # infinite ones are only too bright
        raise UserError(f"{name}: holds NaN", expected="floats from 0 to 1")
    planes = eight_bit(planes)
    rgb = np.repeat(planes, 3, 2) if planes.shape[2] == 1 else planes[..., :3].copy()
    alpha = planes[..., 3].copy() if planes.shape[2] == 4 else None
    return rgb, None if alpha is None or alpha.min() == 255 else alpha


def _white_of(image: Image.Image) -> int:
    """Of whole numbers: 16 bits, as PNG and PGM have at the most, but for 32 that say that they are more."""
    return 2**31 - 1 if image.mode == "I" and np.max(image.getextrema()) > 65535 else 65535


def _parted(image: Image.Image, white: int) -> tuple[Image.Image, Image.Image | None]:
    """-> its colours as one of _PLAIN, and its alpha as L."""
    if image.mode in _DEEP or image.mode.startswith("I;16"):
        deep, clear = np.asarray(image), image.info.get("transparency")
        opacity = Image.fromarray(eight_bit(deep != clear)) if isinstance(clear, int) else None
        return Image.fromarray(eight_bit(deep, white)), opacity
    if image.has_transparency_data:
        both = image.convert("LA" if image.mode in _GREY else "RGBA")
        return both.convert(both.mode[:-1]), both.getchannel("A")
    if image.mode in _PLAIN:
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None


def _to_srgb(mode: str, profile: bytes | None) -> Convert:
    """What turns pictures of a mode into RGB. A profile that is broken, or of another mode, is none."""

    def plain(image: Image.Image) -> Image.Image:
        return image.convert("RGB")

    try:
        source = ImageCms.createProfile("LAB") if mode == "LAB" else ImageCms.ImageCmsProfile(BytesIO(profile or b""))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError, ImportError):  # the last: a Pillow without LittleCMS
        return plain
    if mode == "RGB" and _is_same(transform):
        return plain
    return lambda image: ImageCms.applyTransform(image, transform) or image


def _is_same(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether it is from sRGB to sRGB: then every pixel stays as it is, as it would not by rounding twice."""
    steps = np.linspace(0, 255, 18).astype(np.uint8)
    lattice = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    after = np.asarray(ImageCms.applyTransform(Image.fromarray(lattice), transform))
    return bool(np.abs(after.astype(int) - lattice).max() <= _SAME)
