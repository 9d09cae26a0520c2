"""Large pictures in overlapping pieces. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..config import TILED_PIXELS, VAE_FACTOR

_TILE = 1280 // VAE_FACTOR  # latent pixels each way, at most: 1.6 MP, which the model draws well
_OVERLAP = 192 // VAE_FACTOR  # at least


@dataclass(frozen=True)
class Tile:
    """A piece of a latent image, in its pixels."""

    top: int
    left: int
    height: int
    width: int


def tiles_of(width: int, height: int) -> list[Tile]:
    """width, height: of the picture, in pixels. All of one size, row by row; one that is all of it where the model can
    see the whole."""
    columns, rows = width // VAE_FACTOR, height // VAE_FACTOR
    if width * height <= TILED_PIXELS:
        return [Tile(0, 0, rows, columns)]
    down, across = _size(rows), _size(columns)
    return [Tile(top, left, down, across) for top in _starts(rows, down) for left in _starts(columns, across)]


def _count(length: int) -> int:
    return 1 if length <= _TILE else -(-(length - _OVERLAP) // (_TILE - _OVERLAP))


def _size(length: int) -> int:
    """Even, as patches are; no longer than so many tiles must be."""
    count = _count(length)
    size = -(-(length + (count - 1) * _OVERLAP) // count)
    return min(size + size % 2, length)


def _starts(length: int, size: int) -> Iterator[int]:
    """Evenly spaced, from one end to the other."""
    count = _count(length)
    for i in range(count):
        yield round(i * (length - size) / max(count - 1, 1))
