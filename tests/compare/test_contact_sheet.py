"""The sheet of pictures: its geometry."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from PIL import Image

from zimage_lite.compare.contact_sheet import GAP, SIDE, TEXT_WIDTH, Layout, Row, contact_sheet, scaled


def test_geometry_of_the_sheet(tmp_path: Path) -> None:
    """Pictures of one colour each, wide, high and square ones: each fills its box, and no two boxes meet."""
    sizes = [(64, 64), (96, 64), (32, 512)]
    rows = list[Row]()
    for number, size in enumerate(sizes):
        paths = [tmp_path / f"{number}{column}.png" for column in range(3)]
        for column, path in enumerate(paths):
            Image.new("RGB", size, (80 * number, 90 * column, 200)).save(path)
        rows.append(Row("one two three " * 40, size, paths, ["n" * 90] * 3))
    made = contact_sheet([("h" * 90, "i" * 90, "not drawn")] * 3, rows)
    layout = Layout(3, sizes)
    assert made.size == layout.size
    boxes = {(row, column): layout.picture(row, column) for row in range(3) for column in range(3)}
    for (row, column), box in boxes.items():
        assert (box[2] - box[0], box[3] - box[1]) == scaled(*sizes[row])
        assert made.crop(box).getcolors() == [((box[2] - box[0]) * (box[3] - box[1]), (80 * row, 90 * column, 200))]
    for one, other in combinations([*boxes.values()], 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    # No label leaves its column: the gaps beside the columns are empty, and the labels are there.
    for column in range(4):
        left = GAP + TEXT_WIDTH + column * (SIDE + GAP)
        assert made.crop((left, 0, left + GAP, made.height)).getcolors() == [(GAP * made.height, (255, 255, 255))]
    for spot in (
        (GAP, boxes[0, 0][1], GAP + TEXT_WIDTH, boxes[0, 0][3]),
        (boxes[0, 1][0], GAP, boxes[0, 1][2], 2 * GAP),
    ):
        assert len(made.crop(spot).getcolors() or [0, 0]) > 1


@pytest.mark.parametrize(
    ("size", "expected"), [((64, 64), (256, 256)), ((1024, 512), (256, 128)), ((16, 4096), (1, 256))]
)
def test_scaled(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert scaled(*size) == expected
