"""A worker's process: a Drawer whose order runs in a thread, and what it says, kept until it is asked for. Becomes an
actor of Ray's, and knows nothing of Ray."""

from __future__ import annotations

import platform
import uuid
from contextlib import suppress
from dataclasses import replace
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from ..config import RuntimeOptions
from .drawer import Drawer
from .orders import CancelledError, DrawError, Order, Watch

DRAWN, END = "drawn", "end"  # with the picture; with the error that ended the order, or None
Message = tuple[str, Any]  # DRAWN, END, or a method of Watch with its arguments


class Seat:
    def __init__(self, runtime: RuntimeOptions) -> None:
        self.drawer = Drawer(runtime)
        self._watch = _Noting()
        self._thread: Thread | None = None

    def machine(self) -> str:
        """What tells this machine from others."""
        return f"{platform.node()} {uuid.getnode()}"

    def settle(self, neighbours: int) -> None:
        """neighbours: workers of this machine, this one included. They share what memory is free, or each of them would
        plan with all of it."""
        import psutil

        if neighbours > 1 and self.drawer.runtime.ram_bytes is None:
            share = psutil.virtual_memory().available // neighbours
            self.drawer.runtime = replace(self.drawer.runtime, ram_bytes=share)

    def begin(self, order: Order) -> None:
        """Starts to draw it. One that nobody hears to its end is stopped first."""
        if self._thread:
            self._watch.cancelled = True
            self._thread.join()
        self._watch = _Noting()
        self._thread = Thread(target=self._draw, args=(order, self._watch), name="drawing", daemon=True)
        self._thread.start()

    def hear(self, seconds: float, cancelled: bool, watched: bool) -> list[Message]:
        """What was said since the last time, waited for so long. cancelled, watched: of the watch of who asks."""
        self._watch.cancelled, self._watch.watched = cancelled, watched
        return _said(self._watch, seconds)

    def recipes(self, order: Order) -> tuple[list[dict[str, Any]], list[str]]:
        """As `Drawer.recipes`, between orders; with the lines for people. Raises DrawError."""
        watch = _Noting()
        found = self.drawer.recipes(order, watch)
        return found, [values[0] for name, values in _said(watch, 0) if name == "note"]

    def plan(self, order: Order) -> dict[str, Any]:
        """As `Drawer.plan`, whatever is drawn."""
        return self.drawer.plan(order)

    def give_back(self) -> None:
        """Between orders."""
        self.drawer.give_back()

    def _draw(self, order: Order, watch: _Noting) -> None:
        error: Exception | None = None
        try:
            for picture in self.drawer.draw(order, watch):
                watch.said.put((DRAWN, picture))
        except (DrawError, CancelledError) as raised:
            error = raised.with_traceback(None)
        watch.said.put((END, error))


def _said(watch: _Noting, seconds: float) -> list[Message]:
    """Waited for so long."""
    found = list[Message]()
    with suppress(Empty):
        found.append(watch.said.get(timeout=seconds))
        while True:
            found.append(watch.said.get_nowait())
    return found


class _Noting(Watch):
    """Notes what is said as messages."""

    def __init__(self) -> None:
        self.said: SimpleQueue[Message] = SimpleQueue()

    def progress(self, phase: str, done: int, total: int) -> None:
        self.said.put(("progress", (phase, done, total)))

    def memory(self, facts: Any) -> None:
        self.said.put(("memory", (facts,)))

    def preview(self, jpeg: bytes) -> None:
        self.said.put(("preview", (jpeg,)))

    def note(self, line: str) -> None:
        self.said.put(("note", (line,)))
