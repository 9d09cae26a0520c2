"""How a training goes, as one page: its loss, and what it has drawn. Written anew as it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

from ..page.html import Figure, Pictures, Section, Table, as_html
from ..page.plots import Plot, Point

_POINTS = 100  # of the curve, at most
_SIDE = 256  # of pictures on the page; the whole ones lie beside it
_REFRESH_S = 60


def progress_page(
    title: str, losses: Sequence[float], facts: Mapping[str, str], folder: Path, prompts: Sequence[str]
) -> str:
    """losses: of all steps; folder: with step-000250-0.png, of each prompt; facts: name -> text."""
    section = Section("Loss", [Figure(_curve(losses), "Each point the mean of the steps before it.")])
    table = Section("Settings", [Table(["what", ""], [[name, text] for name, text in facts.items()], texts=2)])
    drawn = [_drawn(folder, number, prompt) for number, prompt in enumerate(prompts)]
    return as_html(title, [section, *drawn, table], refresh_s=_REFRESH_S)


def _curve(losses: Sequence[float]) -> str:
    over = -(-len(losses) // _POINTS)
    ends = range(over, len(losses) + 1, over)
    points = [Point(end, sum(losses[end - over : end]) / over) for end in ends]
    return Plot("Loss", "step", "loss", {"loss": points}).svg()


def _drawn(folder: Path, number: int, prompt: str) -> Section:
    files = sorted(folder.glob(f"step-??????-{number}.png"))
    shown = [(_small(file), f"step {int(file.stem.split('-')[1])}") for file in files]
    return Section(prompt, [Pictures(shown)])


def _small(file: Path) -> bytes:
    """JPEG."""
    from PIL import Image

    with Image.open(file) as picture:
        small = picture.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    out = BytesIO()
    small.save(out, "JPEG", quality=90)
    return out.getvalue()
