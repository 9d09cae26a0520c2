"""A job: what somebody wants drawn, how far it is, and what came of it. Loads no torch."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import Any

from ..config import GenerateOptions

QUEUED, RUNNING, DONE, FAILED, CANCELLED, LOST = "queued", "running", "done", "failed", "cancelled", "lost"
OPEN, OVER = (QUEUED, RUNNING), (DONE, FAILED, CANCELLED, LOST)


class _Moments:
    """Each is later than the one before, as pages of the history are told by it: Windows' clock goes on every 15.6 ms
    (`time.get_clock_info`), and two jobs may come between."""

    def __init__(self) -> None:
        self._last, self._lock = 0.0, Lock()

    def __call__(self) -> float:
        with self._lock:
            self._last = max(time.time(), self._last + 1e-6)
            return self._last


_next_moment = _Moments()


@dataclass(frozen=True)
class Picture:
    """A file of the history."""

    name: str
    width: int
    height: int
    seed: int

    def facts(self) -> dict[str, Any]:
        return {"name": self.name, "width": self.width, "height": self.height, "seed": self.seed}


@dataclass(frozen=True)
class Failure:
    """code: "invalid_request", "too_large" (it does not fit the memory), "out_of_memory" or "internal"."""

    code: str
    message: str

    def facts(self) -> dict[str, str]:
        return {"code": self.code, "message": self.message}


@dataclass
class Job:
    """Changed under the board's lock only. done, total: of the phase; version: of its last change; client: what asked,
    as the history shows it; leaves: it is cancelled when the last who waits for it goes."""

    model: str
    requests: Sequence[GenerateOptions]
    client: str = "api"
    leaves: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    state: str = QUEUED
    created: float = field(default_factory=_next_moment)
    started: float | None = None
    finished: float | None = None
    phase: str | None = None
    done: int = 0
    total: int = 0
    seconds_left: float | None = None
    preview: bytes | None = None  # JPEG
    previews: int = 0  # so far, by which a client sees that there is another
    pictures: list[Picture] = field(default_factory=list)
    failure: Failure | None = None
    memory: dict[str, Any] | None = None  # see `memory_facts`
    notes: list[str] = field(default_factory=list)
    version: int = 0
    cancelled: Event = field(default_factory=Event)
    drawn: set[int] = field(default_factory=set)  # places among the requests
    losses: int = 0  # workers that ended while they drew it
    watching: int = 0  # clients that listen to it
    watched_until: float = 0.0  # by clients that ask again and again, by time.monotonic

    @property
    def over(self) -> bool:
        return self.state in OVER

    def facts(self, position: int | None = None) -> dict[str, Any]:
        """As plain data. position: how many go before it."""
        first = self.requests[0]
        return {
            "id": self.id,
            "state": self.state,
            "client": self.client,
            "model": self.model,
            "prompt": first.prompt,
            "images": len(self.requests),
            "created": self.created,
            "started": self.started,
            "finished": self.finished,
            "position": position,
            "phase": self.phase,
            "step": self.done if self.phase == "denoise" else None,
            "steps": self.total if self.phase == "denoise" else None,
            "done": self.done,
            "total": self.total,
            "seconds_left": None if self.seconds_left is None else round(self.seconds_left, 1),
            "previews": self.previews,
            "pictures": [picture.facts() for picture in self.pictures],
            "error": self.failure.facts() if self.failure else None,
            "memory": self.memory,
            "notes": list(self.notes),
            "version": self.version,
        }
