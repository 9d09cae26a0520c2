"""Pictures as ControlNets were trained to see them, made of ordinary ones: [h, w, 3] uint8 in and out.

Of the kinds that need no network: edges, strokes, grey, few pixels. Depth and poses come as maps that another program
has made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

from .masks import grey, resized

MAKING_BYTES = 90  # a pixel of the result, at most, while it is made: canny's, as counted
_LOW, _HIGH = 100, 200  # gradients from which on an edge goes on, and starts: OpenCV's usual ones for 8 bits
_GAUSS = np.array([1, 4, 6, 4, 1], np.float32) / 16  # about one pixel wide
_SMOOTH, _SLOPE = np.array([1, 2, 1], np.float32), np.array([-1, 0, 1], np.float32)  # Sobel's
_STROKE = 1 / 256  # of the longer side: half a scribble's width
_TILE = 4  # times fewer pixels each way
_TURNS = ((0, 1), (1, 1), (1, 0), (1, -1))  # along which a gradient of 0, 45, 90 and 135 degrees points: rows, columns


def canny(rgb: np.ndarray) -> np.ndarray:
    """Edges, white on black (Canny, 1986): the ridges of the gradient that are steep, and what joins them. Of the three
    colours the steepest counts, as in OpenCV: red on purple is an edge that grey does not have."""
    smooth = [_filtered(channel, _GAUSS, _GAUSS) for channel in rgb.transpose(2, 0, 1).astype(np.float32)]
    slopes = np.stack([[_filtered(one, _SMOOTH, _SLOPE), _filtered(one, _SLOPE, _SMOOTH)] for one in smooth])
    steepest = np.hypot(slopes[:, 0], slopes[:, 1]).argmax(0)
    across, down = np.take_along_axis(slopes, steepest[None, None], 0)[0]
    steep = np.hypot(across, down)
    ridge = _ridges(steep, across, down)
    return _white(_joined(ridge & (steep >= _HIGH), ridge & (steep >= _LOW)))


def scribble(rgb: np.ndarray) -> np.ndarray:
    """A drawing of lines, dark on light or light on dark, as thick white strokes on black."""
    values = grey(rgb)
    strokes = values if np.median(values) < 128 else 255 - values
    lines, radius = strokes >= 128, max(round(max(values.shape) * _STROKE), 1)
    for axis in (0, 1):
        lines = _spread(lines, axis, radius)
    return _white(lines)


def in_grey(rgb: np.ndarray) -> np.ndarray:
    return np.repeat(grey(rgb)[..., None], 3, 2)


def tile(rgb: np.ndarray) -> np.ndarray:
    """As a picture of few pixels looks when it is enlarged."""
    height, width = rgb.shape[:2]
    small = max(width // _TILE, 1), max(height // _TILE, 1)
    return resized(resized(rgb, small, Image.Resampling.BOX), (width, height), Image.Resampling.BICUBIC)


def _as_it_is(rgb: np.ndarray) -> np.ndarray:
    return rgb


MAKERS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "map": _as_it_is, "canny": canny, "scribble": scribble, "grey": in_grey, "tile": tile
}  # fmt: skip


def _filtered(values: np.ndarray, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """[h, w] float32, by one filter for each axis; beyond the edge the last value goes on."""
    for axis, weights in ((0, down), (1, across)):
        half, length = len(weights) // 2, values.shape[axis]
        wide = np.pad(values, [(half, half) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        values = sum(weight * wide.take(range(i, i + length), axis) for i, weight in enumerate(weights))
    return values


def _ridges(steep: np.ndarray, across: np.ndarray, down: np.ndarray) -> np.ndarray:
    """[h, w] bool: where no neighbour along the gradient is steeper; of two that are alike, the first."""
    turn = np.round(np.arctan2(down, across) / (np.pi / 4)).astype(int) % 4
    wide, found = np.pad(steep, 1), np.zeros(steep.shape, bool)
    for number, (rows, columns) in enumerate(_TURNS):
        before, after = (_shifted(wide, sign * rows, sign * columns) for sign in (-1, 1))
        found |= (turn == number) & (steep > before) & (steep >= after)
    return found


def _shifted(wide: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """What lies so far away, of values with one more on each side."""
    height, width = wide.shape
    return wide[1 + rows : height - 1 + rows, 1 + columns : width - 1 + columns]


def _joined(start: np.ndarray, possible: np.ndarray) -> np.ndarray:
    """Of what is possible, all that is connected to the start, by sides or corners."""
    left, found = np.pad(possible, 1).ravel(), np.pad(start, 1).ravel()
    row = possible.shape[1] + 2
    around = np.array([rows * row + columns for rows in (-1, 0, 1) for columns in (-1, 0, 1)])
    front = np.flatnonzero(found)
    while front.size:
        near = (front[:, None] + around).ravel()
        front = np.unique(near[left[near] & ~found[near]])
        found[front] = True
    return found.reshape(-1, row)[1:-1, 1:-1]


def _spread(marked: np.ndarray, axis: int, radius: int) -> np.ndarray:
    """[h, w] bool: what is at most so far away along an axis, too."""
    wide = np.pad(marked, [(radius, radius) if a == axis else (0, 0) for a in (0, 1)])
    length, found = marked.shape[axis], np.zeros_like(marked)
    for i in range(2 * radius + 1):
        found = found | wide.take(range(i, i + length), axis)
    return found


def _white(marked: np.ndarray) -> np.ndarray:
    return np.repeat(np.where(marked, 255, 0).astype(np.uint8)[..., None], 3, 2)
