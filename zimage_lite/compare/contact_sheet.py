"""Pictures side by side: a row for each prompt, a column for each model, as one picture with its labels drawn.

Pictures are scaled so that their longer side is the same, and are read one at a time. Pillow's own font knows Latin
letters; for other prompts a font of the system is looked up by name, and where none is found, boxes are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE = 256  # pixels, of a picture's longer side
GAP = 12
TEXT_WIDTH = 216  # of the column of prompts
LINE, _POINTS = 20, 14
HEAD_LINES = 2  # above each column
_INK, _SOFT, _PAPER = "#1c1e21", "#5f6670", "#ffffff"
_LATIN = 0x250  # what lies beyond is not in Pillow's own font
_CJK_FONTS = ("NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc", "Hiragino Sans GB.ttc", "wqy-microhei.ttc")

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Row:
    """text: the prompt and its seed; pictures: one file per column, all of `size`; notes: a line under each."""

    text: str
    size: tuple[int, int]
    pictures: Sequence[Path]
    notes: Sequence[str]


@dataclass(frozen=True)
class Layout:
    """Where everything goes. sizes: width and height of each row's pictures."""

    columns: int
    sizes: Sequence[tuple[int, int]]

    @property
    def size(self) -> tuple[int, int]:
        return self._left(self.columns), self._top(len(self.sizes))

    def picture(self, row: int, column: int) -> Box:
        """Scaled, in the middle of its column."""
        width, height = scaled(*self.sizes[row])
        left = self._left(column) + (SIDE - width) // 2
        return left, self._top(row), left + width, self._top(row) + height

    def head(self, column: int) -> tuple[int, int]:
        return self._left(column), GAP

    def text(self, row: int) -> tuple[int, int]:
        return GAP, self._top(row)

    def note(self, row: int, column: int) -> tuple[int, int]:
        return self._left(column), self.picture(row, column)[3]

    def _left(self, column: int) -> int:
        return GAP + TEXT_WIDTH + GAP + column * (SIDE + GAP)

    def _top(self, row: int) -> int:
        above = sum(scaled(*size)[1] + LINE + GAP for size in self.sizes[:row])
        return GAP + HEAD_LINES * LINE + GAP + above


def scaled(width: int, height: int) -> tuple[int, int]:
    """So that the longer side is SIDE."""
    longer = max(width, height)
    return max(round(width * SIDE / longer), 1), max(round(height * SIDE / longer), 1)


def contact_sheet(heads: Sequence[Sequence[str]], rows: Sequence[Row]) -> Image.Image:
    """heads: up to two lines above each column. -> RGB."""
    layout = Layout(len(heads), [row.size for row in rows])
    sheet = Image.new("RGB", layout.size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    font = _font("".join([*(line for head in heads for line in head), *(row.text for row in rows)]))
    for column, lines in enumerate(heads):
        left, top = layout.head(column)
        for number, line in enumerate(lines[:HEAD_LINES]):
            pen.text((left, top + number * LINE), _cut(line, font, SIDE), fill=(_INK, _SOFT)[number > 0], font=font)
    for number, row in enumerate(rows):
        left, top = layout.text(number)
        room = scaled(*row.size)[1] // LINE
        for i, line in enumerate(_wrapped(row.text, font, max(room, 1))):
            pen.text((left, top + i * LINE), line, fill=_INK, font=font)
        for column, (path, note) in enumerate(zip(row.pictures, row.notes, strict=True)):
            box = layout.picture(number, column)
            with Image.open(path) as picture:
                small = picture.convert("RGB").resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.BICUBIC)
            sheet.paste(small, box)
            pen.text(layout.note(number, column), _cut(note, font, SIDE), fill=_SOFT, font=font)
    return sheet


def _font(text: str) -> Font:
    if any(ord(char) >= _LATIN for char in text):
        for name in _CJK_FONTS:
            with suppress(OSError):
                return ImageFont.truetype(name, _POINTS)
    return ImageFont.load_default(_POINTS)


def _wrapped(text: str, font: Font, most: int) -> Iterator[str]:
    """Lines of at most TEXT_WIDTH pixels, broken at spaces where there are any; the last one says if more was cut."""
    rest = _printable(text).strip()
    for number in range(most):
        if not rest:
            return
        if number == most - 1:
            yield _cut(rest, font, TEXT_WIDTH)
            return
        end = _fitting(rest, font, TEXT_WIDTH)
        if end < len(rest) and " " in rest[1 : end + 1]:
            end = rest.rindex(" ", 1, end + 1)
        yield rest[:end]
        rest = rest[end:].lstrip()


def _cut(text: str, font: Font, width: int) -> str:
    """Shortened with an ellipsis, if it is too long for so many pixels."""
    text = _printable(text)
    if font.getlength(text) <= width:
        return text
    return text[: _fitting(text, font, width - int(font.getlength("…")))] + "…"


def _fitting(text: str, font: Font, width: int) -> int:
    """How many characters fit into so many pixels; at least one."""
    end = 1
    while end < len(text) and font.getlength(text[: end + 1]) <= width:
        end += 1
    return end


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)
