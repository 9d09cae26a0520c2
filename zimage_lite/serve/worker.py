"""A thread that takes jobs from the board and has them drawn, one after another, by a drawer that is its own: in this
process or in another. Loads no torch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from threading import Thread
from typing import Any, Protocol

from ..workers.orders import CancelledError, DrawError, Drawn, LostError, Order, Watch
from .board import Board
from .history import StorageError
from .jobs import CANCELLED, DONE, FAILED, Failure, Job

MOST_LOSSES = 2  # workers, that one job may take with it
_log = logging.getLogger(__name__)


class Drawer(Protocol):
    """`workers.drawer.Drawer`, or `workers.cluster.RayDrawer`."""

    def draw(self, order: Order, watch: Watch) -> Iterator[Drawn]: ...
    def plan(self, order: Order) -> dict[str, Any]: ...
    def give_back(self) -> None: ...
    def renew(self) -> None: ...


class Worker(Thread):
    """order: of the pictures of a job that are still to be drawn; keep: takes one, with its place in the job; shown:
    what clients see of a line for people."""

    def __init__(
        self, board: Board, drawer: Drawer, order: Callable[[Job, list[int]], Order],
        keep: Callable[[Job, int, Drawn], None], idle_s: float, shown: Callable[[str], str],
    ) -> None:  # fmt: skip
        super().__init__(name="drawing", daemon=True)
        self.board, self.drawer, self.order, self.keep, self.idle_s = board, drawer, order, keep, idle_s
        self.shown = shown

    def run(self) -> None:
        while not self.board.closed:
            if not (job := self.board.next(self.idle_s)):
                self.drawer.give_back()
            elif not self._drawn(job) and not self._renewed():
                return

    def _drawn(self, job: Job) -> bool:
        """False if the drawer was lost: what is missing is drawn by another."""
        try:
            self._images(job)
        except CancelledError:
            self.board.finish(job, CANCELLED)
        except StorageError as error:
            self.board.finish(job, FAILED, Failure("storage", str(error)))
        except DrawError as error:
            message = self.shown(error.message)
            if error.detail:
                _log.error("job %s failed\n%s", job.id, error.detail)
                message = f"{message}: the server's log has more"
            self.board.finish(job, FAILED, Failure(error.code, message))
        except LostError as error:
            _log.error("job %s: %s", job.id, error)
            job.losses += 1
            if job.losses < MOST_LOSSES:
                self.board.put_back(job)
            else:
                self.board.finish(job, FAILED, Failure("internal", f"{job.losses} workers ended while they drew it"))
            return False
        except Exception as error:  # noqa: BLE001 - whatever it was, the next one is drawn
            _log.error("job %s failed", job.id, exc_info=error)
            self.board.finish(job, FAILED, Failure("internal", f"{type(error).__name__}: the server's log has more"))
        else:
            self.board.finish(job, DONE)
        return True

    def _images(self, job: Job) -> None:
        watch, todo = (
            _OfJob(self.board, job, self.shown),
            [place for place in range(len(job.requests)) if place not in job.drawn],
        )
        with closing(self.drawer.draw(self.order(job, todo), watch)) as images:  # type: ignore[type-var]
            for drawn in images:
                place = todo[drawn.place]
                self.keep(job, place, drawn)
                job.drawn.add(place)

    def _renewed(self) -> bool:
        try:
            self.drawer.renew()
        except LostError as error:
            _log.error("one worker less: %s", error)
            return False
        return True


class _OfJob(Watch):
    """Tells the board how far a job is, and how long it may still take: by the steps so far."""

    def __init__(self, board: Board, job: Job, shown: Callable[[str], str]) -> None:
        self.board, self.job, self.shown = board, job, shown
        self.first: tuple[float, int] | None = None

    @property
    def cancelled(self) -> bool:  # type: ignore[override]
        return self.job.cancelled.is_set()

    @property
    def watched(self) -> bool:  # type: ignore[override]
        return self.board.is_watched(self.job)

    def progress(self, phase: str, done: int, total: int) -> None:
        left = None
        if phase == "denoise":
            now = time.monotonic()
            if self.first is None:
                self.first = now, done
            start, steps = self.first
            left = (now - start) / (done - steps) * (total - done) if done > steps else None
        self.board.change(self.job, phase=phase, done=done, total=total, seconds_left=left)

    def memory(self, facts: Mapping[str, Any]) -> None:
        self.board.change(self.job, memory=dict(facts))

    def preview(self, jpeg: bytes) -> None:
        self.board.change(self.job, preview=jpeg, previews=self.job.previews + 1)

    def note(self, line: str) -> None:
        self.board.change(self.job, notes=[*self.job.notes, self.shown(line)])
