"""Progress on stderr. Nothing is drawn where stderr is not a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from rich.console import Console, ConsoleRenderable, RenderHook
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text


class Texts(RenderHook):
    """Counts what is printed above bars: not the bars themselves, nor what only moves the cursor."""

    count = 0

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        self.count += any(isinstance(renderable, Text) for renderable in renderables)
        return renderables


TEXTS = Texts()


@cache
def console() -> Console:
    """stderr's. All that is drawn there while bars are shown goes through the one that knows of them."""
    made = Console(stderr=True)
    made.push_render_hook(TEXTS)
    return made


def _bars(*columns: ProgressColumn) -> Progress:
    return Progress(*columns, console=console(), transient=True, disable=not console().is_terminal)


@contextmanager
def byte_progress(title: str, extra: str) -> Iterator[tuple[Callable[[int, int], None], Callable[[int], None]]]:
    """Yields progress(done_bytes, total_bytes), which shows bytes, rate and time left, and more(bytes), which adds to a
    second line, called `extra`, that is there once something has been added."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with _bars(*columns) as bars:
        task = bars.add_task(title, total=None)
        added = bars.add_task(extra, total=None, visible=False)
        yield (
            lambda done, total: bars.update(task, completed=done, total=total),
            lambda n_bytes: bars.update(added, advance=n_bytes, visible=True),
        )


@contextmanager
def phase_progress(*phases: str) -> Iterator[Callable[[str, int, int], None]]:
    """Yields progress(phase, done, total): one bar per phase, if not named those of drawing."""
    columns = (TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with _bars(*columns) as bars:
        tasks = {phase: bars.add_task(phase, total=None) for phase in phases or ("encode", "denoise", "decode")}
        yield lambda phase, done, total: bars.update(tasks[phase], completed=done, total=total)


@contextmanager
def picture_progress(total: int) -> Iterator[Callable[[], None]]:
    """Yields what is to be called after each picture."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with _bars(*columns) as bars:
        task = bars.add_task("pictures", total=total)
        yield lambda: bars.advance(task)
