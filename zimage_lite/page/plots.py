"""Plots as inline SVG: points, ranges and lines over two axes. Colours are classes of the page, so that they follow its
light or dark dress. Everything that is text is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

_WIDTH, _HEIGHT = 440, 320  # small, so that its letters are large enough on a phone
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 14, 46  # around the plot itself
_LEGEND_ROW, _LEGEND_COLUMNS, _LEGEND_CHARACTERS = 20, 2, 24
_COLOURS = 6
_CHARACTER = 6.2  # width of a small letter
# Where a point's label may go, by preference: offset and anchor.
_PLACES = ((7, 4, "start"), (-7, 4, "end"), (0, -8, "middle"), (0, 16, "middle"))

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Point:
    """high: where it is a range. label: beside it."""

    x: float
    y: float
    high: float | None = None
    label: str = ""

    @property
    def top(self) -> float:
        return self.y if self.high is None else self.high


@dataclass(frozen=True)
class Plot:
    """series: name -> points, from left to right; joined: by lines. Logarithms are of the y axis."""

    title: str
    x_label: str
    y_label: str
    series: dict[str, list[Point]] = field(default_factory=dict)
    logarithmic: bool = False
    joined: bool = True

    @property
    def points(self) -> list[Point]:
        return [point for points in self.series.values() for point in points]

    def svg(self) -> str:
        """Raises ValueError if there is nothing to draw."""
        points = self.points
        if not all(math.isfinite(v) for p in points for v in (p.x, p.y, p.top)):
            raise ValueError("a point that is nowhere")
        xs = _ticks(min(p.x for p in points), max(p.x for p in points))
        low, high = min(p.y for p in points), max(p.top for p in points)
        ys = _log_ticks(low, high) if self.logarithmic else _ticks(min(low, 0), high)
        legend = -(-len(self.series) // _LEGEND_COLUMNS) * _LEGEND_ROW if len(self.series) > 1 else 0
        height = _HEIGHT + legend
        out = [
            f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" class="plot" font-size="13">',
            f"<title>{escape(self.title)}</title>",
            *self._axes(xs, ys),
        ]
        taken = [_around(_x(p.x, xs), self._y(p.y, ys)) for p in points]  # so that no label lies on a point
        for number, points in enumerate(self.series.values()):
            out += self._series(number, points, xs, ys, taken)
        if legend:
            out += [self._legend(number, name) for number, name in enumerate(self.series)]
        return "\n".join([*out, "</svg>"])

    def _axes(self, xs: Sequence[float], ys: Sequence[float]) -> Iterable[str]:
        bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        for x in xs:
            at = _x(x, xs)
            yield f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{bottom}"/>'
            yield f'<text x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{x:g}</text>'
        for y in ys:
            at = self._y(y, ys)
            yield f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
            yield f'<text x="{_LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{y:g}</text>'
        middle = (_LEFT + right) / 2
        yield f'<text x="{middle:.1f}" y="{bottom + 36}" text-anchor="middle">{escape(self.x_label)}</text>'
        yield (
            f'<text transform="translate(13 {(_TOP + bottom) / 2:.1f}) rotate(-90)" text-anchor="middle">'
            f"{escape(self.y_label)}</text>"
        )

    def _series(
        self, number: int, points: Sequence[Point], xs: Sequence[float], ys: Sequence[float], taken: list[Box]
    ) -> Iterable[str]:
        colour = f"c{number % _COLOURS}"
        if self.joined and len(points) > 1:
            for edge in sorted({"y", "top"} if any(point.high for point in points) else {"y"}):
                path = " ".join(f"{_x(p.x, xs):.1f},{self._y(getattr(p, edge), ys):.1f}" for p in points)
                yield f'<polyline class="line {colour}" points="{path}"/>'
        for point in points:
            x, y, top = _x(point.x, xs), self._y(point.y, ys), self._y(point.top, ys)
            said = escape(f"{point.label} {_said(point)}".strip())
            if top != y:
                yield f'<line class="bar {colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{top:.1f}"/>'
            yield f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{said}</title></circle>'
            yield from _label(point.label, x, y, taken)

    def _y(self, value: float, ticks: Sequence[float]) -> float:
        low, high = ticks[0], ticks[-1]
        part = math.log(value / low) / math.log(high / low) if self.logarithmic else (value - low) / (high - low)
        return _HEIGHT - _BOTTOM - part * (_HEIGHT - _TOP - _BOTTOM)

    def _legend(self, number: int, name: str) -> str:
        x = _LEFT + number % _LEGEND_COLUMNS * (_WIDTH - _LEFT) / _LEGEND_COLUMNS
        y = _HEIGHT + number // _LEGEND_COLUMNS * _LEGEND_ROW + 10
        short = name if len(name) <= _LEGEND_CHARACTERS else name[: _LEGEND_CHARACTERS - 1] + "…"
        return (
            f'<circle class="dot c{number % _COLOURS}" cx="{x:.1f}" cy="{y - 4}" r="5"/>'
            f'<text x="{x + 10:.1f}" y="{y}">{escape(short)}</text>'
        )


def _around(x: float, y: float) -> Box:
    return x - 4, y - 4, x + 4, y + 4


def _label(text: str, x: float, y: float, taken: list[Box]) -> Iterable[str]:
    """Where nothing else is; nowhere, if there is no room."""
    width = _CHARACTER * len(text)
    for dx, dy, anchor in _PLACES if text else ():
        left = x + dx - {"start": 0, "middle": width / 2, "end": width}[anchor]
        box = left, y + dy - 9, left + width, y + dy + 2
        inside = box[0] >= _LEFT and box[2] <= _WIDTH and box[1] >= 0
        if inside and all(box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1] for b in taken):
            taken.append(box)
            yield f'<text x="{x + dx:.1f}" y="{y + dy:.1f}" text-anchor="{anchor}" font-size="11">{escape(text)}</text>'
            return


def _said(point: Point) -> str:
    return f"{point.x:g}: {point.y:g}" + (f" to {point.high:g}" if point.high is not None else "")


def _x(value: float, ticks: Sequence[float]) -> float:
    return _LEFT + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (_WIDTH - _LEFT - _RIGHT)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers around both, four to nine of them."""
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each power of ten, around both. Both are above 0."""
    if low <= 0:
        raise ValueError("no logarithm")
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [round(factor * 10.0**power, 12) for power in powers for factor in (1, 2, 5)]
    first = max((i for i, tick in enumerate(found) if tick <= low), default=0)
    last = next(i for i, tick in enumerate(found) if tick >= high)
    return found[first : max(last, first + 1) + 1]
