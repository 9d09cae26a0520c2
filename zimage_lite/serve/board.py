"""Where jobs wait, and where all see how they are: a bounded queue, first come first served. Loads no torch.

All changes are made here, under one lock, and each has a number; who listens asks for what changed since theirs. So no
client, however slow, makes anything grow.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition
from typing import Any

from ..errors import UserError
from .jobs import CANCELLED, QUEUED, RUNNING, Failure, Job

KEPT = 100  # jobs that are over; the history has all
GLANCE_S = 10.0  # after it was looked at, a client that polls is taken to look still
_FIRST_GUESS_S = 20.0  # for a job, before one was drawn


class QueueFullError(UserError):
    """seconds: after which there may be a place."""

    def __init__(self, waiting: int, seconds: int) -> None:
        super().__init__(f"{waiting} jobs wait already", fix=f"try again in {seconds} s")
        self.seconds = seconds


def _ignored(job: Job) -> None:
    """Nothing is recorded."""


class Board:
    """places: jobs that may wait; record: called with each job that starts or is over, before anybody hears of it."""

    def __init__(self, places: int, record: Callable[[Job], object] = _ignored) -> None:
        self.places, self.record, self.closed, self.version = places, record, False, 0
        self._lock = Condition()  # of an RLock: what holds it may call what takes it
        self._waiting: deque[Job] = deque()
        self._jobs: dict[str, Job] = {}
        self._listeners: set[Callable[[], object]] = set()
        self._job_seconds = _FIRST_GUESS_S
        self._watching = 0  # those who listen to all jobs
        self.all_running: list[Job] = []  # the one that started first is first

    @property
    def running(self) -> Job | None:
        """The one that started first, of those that run."""
        with self._lock:
            return self.all_running[0] if self.all_running else None

    def submit(self, job: Job, accepted: Callable[[Job], object] = _ignored) -> Job:
        """accepted: called when there is a place for it, before anybody sees it. Raises QueueFullError."""
        with self._lock:
            if self.closed:
                raise UserError("the server is stopping")
            if len(self._waiting) >= self.places:
                raise QueueFullError(len(self._waiting), self._wait_s())
            accepted(job)
            self._waiting.append(job)
            self._jobs[job.id] = job
            self._forget_old()
            self._changed(job)
        return job

    def next(self, timeout_s: float) -> Job | None:
        """For the worker: the job whose turn it is, running from now on; None if none came in time or all is over."""
        with self._lock:
            self._lock.wait_for(lambda: self._waiting or self.closed, timeout_s)
            if self.closed or not self._waiting:
                return None
            job = self._waiting.popleft()
            self.all_running.append(job)
            job.state, job.started = RUNNING, time.time()
            self.record(job)
            self._changed(job, *self._waiting)
            return job

    def put_back(self, job: Job) -> None:
        """One that ran and is to be drawn by another worker, before all that wait."""
        with self._lock:
            self.all_running.remove(job)
            job.state, job.phase, job.seconds_left, job.preview = QUEUED, None, None, None
            self._waiting.appendleft(job)
            if self.closed or job.cancelled.is_set():
                self._waiting.remove(job)
                self.finish(job, CANCELLED)
            else:
                self.record(job)
            self._changed(*self._waiting)

    def change(self, job: Job, **values: Any) -> None:
        with self._lock:
            for name, value in values.items():
                setattr(job, name, value)
            self._changed(job)

    def finish(self, job: Job, state: str, failure: Failure | None = None) -> None:
        with self._lock:
            job.state, job.finished, job.failure, job.preview = state, time.time(), failure, None
            job.phase = job.seconds_left = None
            self.record(job)
            if job in self.all_running:
                self.all_running.remove(job)
                if job.started and state != CANCELLED:
                    self._job_seconds = 0.7 * self._job_seconds + 0.3 * (job.finished - job.started)
            self._changed(job)

    def cancel(self, job: Job) -> bool:
        """Out of the queue at once; a running one stops within a step, and says so then. False if it was over."""
        with self._lock:
            if job.over:
                return False
            job.cancelled.set()
            if job.state == QUEUED:
                self._waiting.remove(job)
                self.finish(job, CANCELLED)
                self._changed(*self._waiting)
            return True

    def get(self, job_id: str) -> Job | None:
        return self._jobs.get(job_id)

    def forget(self, job: Job) -> None:
        """One that is over, and deleted."""
        with self._lock:
            self._jobs.pop(job.id, None)

    def facts(self, job: Job) -> dict[str, Any]:
        with self._lock:
            return job.facts(self._position(job))

    def since(self, version: int) -> list[dict[str, Any]]:
        """What changed after that, the oldest change first."""
        with self._lock:
            changed = sorted((job for job in self._jobs.values() if job.version > version), key=lambda job: job.version)
            return [job.facts(self._position(job)) for job in changed]

    def waiting(self) -> int:
        return len(self._waiting)

    @contextmanager
    def listening(self, listener: Callable[[], object]) -> Iterator[None]:
        """listener: called from whatever thread makes a change, with the lock held: it may only set something."""
        with self._lock:
            self._listeners.add(listener)
        try:
            yield
        finally:
            with self._lock:
                self._listeners.discard(listener)

    @contextmanager
    def watching(self, job: Job | None = None) -> Iterator[None]:
        """Somebody looks at the job, or at all of them: so long, previews are made."""
        with self._lock:
            self._watch(job, 1)
        try:
            yield
        finally:
            with self._lock:
                self._watch(job, -1)

    def _watch(self, job: Job | None, count: int) -> None:
        if job:
            job.watching += count
        else:
            self._watching += count

    def glance(self, job: Job) -> None:
        """Somebody looks now, and soon again."""
        job.watched_until = time.monotonic() + GLANCE_S

    def is_watched(self, job: Job) -> bool:
        return bool(self._watching or job.watching) or time.monotonic() < job.watched_until

    def wait(self, job: Job, timeout_s: float | None = None) -> bool:
        """Whether it was over in time. For scripts and tests."""
        with self._lock:
            return self._lock.wait_for(lambda: job.over, timeout_s)

    def close(self) -> list[Job]:
        """No more jobs; the running one is told to stop. Returns those that waited."""
        with self._lock:
            self.closed, left = True, list(self._waiting)
            self._waiting.clear()
            for job in self.all_running:
                job.cancelled.set()
            self._changed()  # who listens sees that it is closed
            return left

    def _changed(self, *jobs: Job) -> None:
        for job in jobs:
            self.version += 1
            job.version = self.version
        self._lock.notify_all()
        for listener in self._listeners:
            listener()

    def _position(self, job: Job) -> int | None:
        return self._waiting.index(job) + len(self.all_running) if job.state == QUEUED else None

    def _wait_s(self) -> int:
        """Until one more is drawn, about. Clients of OpenAI's package give up where they are told more than 120."""
        return round(min(max(self._job_seconds, 1.0), 120.0))

    def _forget_old(self) -> None:
        over = [job for job in self._jobs.values() if job.over]
        for job in over[: max(len(over) - KEPT, 0)]:
            del self._jobs[job.id]
