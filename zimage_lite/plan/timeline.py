"""A step as a picture: who reads, copies and computes when. As text, and as SVG."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from ..memory.plan import Plan
from ..memory.simulate import Event

_WIDTH = 96  # characters
_WORKERS = ("read", "copy", "compute")
_COLOURS = ("#4c78a8", "#f58518", "#54a24b")  # of slots
_STAYS = "#bab0ac"
_SVG_WIDTH, _SVG_ROW, _SVG_LEFT, _SVG_TOP = 1000, 34, 80, 56


def as_text(plan: Plan) -> list[str]:
    """One line per worker: a digit for the slot of the block it is busy with, # for blocks that stay, . for waiting."""
    start, end = plan.steady_pass()
    lines = []
    for worker, events in _rows(plan):
        cells = ["."] * _WIDTH
        for event in events:
            first, last = ((time - start) / (end - start) * _WIDTH for time in (event.start_ms, event.end_ms))
            for cell in range(max(round(first), 0), min(max(round(last), round(first) + 1), _WIDTH)):
                cells[cell] = "#" if event.slot is None else str(event.slot)
        lines.append(f"{worker:<8}{''.join(cells)}")
    return lines


def as_svg(plan: Plan, title: str) -> str:
    """The same, to be looked at."""
    start, end = plan.steady_pass()
    rows = list(_rows(plan))
    scale, height = _SVG_WIDTH / (end - start), _SVG_TOP + _SVG_ROW * len(rows)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_SVG_LEFT + _SVG_WIDTH + 20} {height + 34}" '
        'font-family="sans-serif" font-size="13">',
        f"<title>{escape(title)}</title>",
        f'<text x="{_SVG_LEFT}" y="20" font-size="15">{escape(title)}</text>',
    ]
    legend = [(_STAYS, "stays on the device"), *((_COLOURS[i], f"slot {i}") for i in range(plan.slots))]
    for i, (colour, text) in enumerate(legend):
        x = _SVG_LEFT + (170 * bool(i)) + 80 * max(i - 1, 0)
        out.append(f'<rect x="{x}" y="30" width="12" height="12" fill="{colour}"/>')
        out.append(f'<text x="{x + 17}" y="41">{text}</text>')
    for number, (worker, events) in enumerate(rows):
        y = _SVG_TOP + _SVG_ROW * number
        out.append(f'<text x="8" y="{y + 19}">{worker}</text>')
        out.append(f'<rect x="{_SVG_LEFT}" y="{y}" width="{_SVG_WIDTH}" height="{_SVG_ROW - 6}" fill="#f4f4f4"/>')
        for event in events:
            left, right = max(event.start_ms, start), min(event.end_ms, end)
            colour = _STAYS if event.slot is None else _COLOURS[event.slot]
            label = f"{event.name}: {worker} {event.end_ms - event.start_ms:.1f} ms"
            out.append(
                f'<rect x="{_SVG_LEFT + (left - start) * scale:.2f}" y="{y}" width="{(right - left) * scale:.2f}" '
                f'height="{_SVG_ROW - 6}" fill="{colour}" stroke="white" stroke-width="0.5">'
                f"<title>{escape(label)}</title></rect>"
            )
    out.append(f'<text x="{_SVG_LEFT}" y="{height + 18}">0 ms</text>')
    out.append(
        f'<text x="{_SVG_LEFT + _SVG_WIDTH}" y="{height + 18}" text-anchor="end">{end - start:.0f} ms</text></svg>'
    )
    return "\n".join(out) + "\n"


def _rows(plan: Plan) -> Iterator[tuple[str, list[Event]]]:
    """What each worker does in one pass under way; those with nothing to do are left out, but for the computing one.

    What is copied at its end belongs to the next pass."""
    start, end = plan.steady_pass()
    inside = [event for event in plan.simulated().events if event.end_ms > start and event.start_ms < end]
    for worker in _WORKERS:
        events = [event for event in inside if event.worker == worker]
        if events or worker == "compute":
            yield worker, events
