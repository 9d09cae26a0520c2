"""Pictures to read, made on the spot: random ones, files of any kind, and PNG chunk by chunk."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image


def smooth(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Smooth colours, so that a step aside would show."""
    return Image.fromarray(noise(5, 4, seed=seed)).resize(size, Image.Resampling.BICUBIC)


def hole(size: tuple[int, int]) -> Image.Image:
    """A mask of the right two thirds, but for the bottom."""
    found = Image.new("L", size)
    found.paste(255, (size[0] // 3, 0, size[0], size[1] * 2 // 3))
    return found


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """[height, width, channels] uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """A file of Pillow's format `kind`."""
    raw = BytesIO()
    image.save(raw, kind, **options)
    return raw.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, depth: int, colours: int, rows: bytes, extra: bytes = b"") -> bytes:
    """colours: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA; rows: each with its filter before it; extra: chunks
    before them."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows)) if rows else b""
    return b"\x89PNG\r\n\x1a\n" + head + extra + body + chunk(b"IEND", b"")
