"""The streamer's workers on a real machine: a few threads that read, one that copies, one that pins, and a link.

Everything is asked for by the computing thread and refers only to what was asked before, and each worker takes its work
in order, so nothing can wait for itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from dataclasses import dataclass
from threading import Event as Flag
from typing import Any, Protocol

import torch
from torch import Tensor

READERS = 3  # NVMe drives and page caches give one thread half of what they have
_PATIENCE_SECONDS = 0.2  # on Windows a waiting thread does not see Ctrl-C

Happening = Sequence["Future[Any]"]  # when all are done; their results are what the link can wait for, or None
Job = Callable[[], object]


class Link(Protocol):
    """How bytes reach the device, and how it tells how far it is. A moment is whatever the link can wait for."""

    def copy(self, source: Tensor, into: Tensor, after: Sequence[Any]) -> Any:
        """-> the moment when it is done."""

    def mark(self) -> Any:
        """The moment when everything asked to compute so far is done."""

    def pause(self) -> Any:
        """The moment from which the device may have nothing to compute, for `hold`."""

    def hold(self, moment: Any, paused: Any) -> None:
        """Compute nothing more before that moment. paused: when the waiting began."""

    def block(self, moment: Any) -> None:
        """Wait for it in the calling thread."""

    def waited_seconds(self) -> float | None:
        """That the device held on for moments to come, None if just as long as the calling thread. Waits until the
        device has caught up."""

    def pin(self, buffer: Tensor) -> bool:
        """Let the link read this memory by itself, if it can. Called in a thread of its own, before copies from it."""

    def close(self) -> None:
        """When nothing is being copied any more."""


class HostLink:
    """For a device that computes in the host's own memory, while the calling thread waits: nothing is copied."""

    def copy(self, source: Tensor, into: Tensor, after: Sequence[Any]) -> None:
        into.copy_(source)

    def mark(self) -> None:
        return None

    def pause(self) -> None:
        return None

    def hold(self, moment: None, paused: None) -> None:
        return None

    def block(self, moment: None) -> None:
        return None

    def waited_seconds(self) -> None:
        return None

    def pin(self, buffer: Tensor) -> bool:
        return False

    def close(self) -> None:
        return None


@dataclass(frozen=True)
class Moved:
    """What workers did. wait_seconds: that computing stood still for blocks that were not there yet."""

    read_bytes: int = 0
    copied_bytes: int = 0
    pinned_bytes: int = 0
    wait_seconds: float = 0.0


class Threads:
    """sizes: bytes of each block, which lie at the start of its place. jobs(name, buffer): what must be done to fill
    such a place from the file, in any order and at once.

    Close it: it drops what has not begun, and waits for what has.
    """

    def __init__(
        self, sizes: Mapping[str, int], jobs: Callable[[str, Tensor], Iterable[Job]], link: Link | None = None
    ) -> None:
        self.sizes, self.jobs, self.link = sizes, jobs, link or HostLink()
        self._closed = Flag()
        self._readers = ThreadPoolExecutor(READERS, "read")
        self._copier = ThreadPoolExecutor(1, "copy")
        self._pinner = ThreadPoolExecutor(1, "pin")
        self._pinning: dict[int, Future[None]] = {}  # by address
        self._read_bytes = self._copied_bytes = self._pinned_bytes = 0
        self._wait_seconds = 0.0

    def pin(self, buffers: Iterable[Tensor]) -> None:
        """One after another, while the first pass reads: it takes about as long as reading. A buffer is not copied from
        before; where the system refuses, its copies are slower."""

        def pin(buffer: Tensor) -> None:
            if not self._closed.is_set() and self.link.pin(buffer):
                self._pinned_bytes += len(buffer)

        for buffer in buffers:
            self._pinning[buffer.data_ptr()] = self._pinner.submit(pin, buffer)

    def read(self, name: str, into: Tensor, after: Sequence[Happening]) -> Happening:
        self._read_bytes += self.sizes[name]
        return [self._readers.submit(self._when_ready, job, after) for job in self.jobs(name, into)]

    def fetch(self, name: str, source: Tensor, into: Tensor, after: Sequence[Happening]) -> Happening:
        n_bytes = self.sizes[name]
        return [self._readers.submit(self._when_ready, lambda: into[:n_bytes].copy_(source[:n_bytes]), after)]

    def put_aside(self, name: str, source: Tensor, into: Tensor, after: Sequence[Happening]) -> Happening:
        return self.fetch(name, source, into, after)

    def copy(self, name: str, source: Tensor, into: Tensor, after: Sequence[Happening]) -> Happening:
        n_bytes = self.sizes[name]
        self._copied_bytes += n_bytes
        pinning = self._pinning.get(source.data_ptr())
        ready = after if pinning is None else [*after, [pinning]]
        return [self._copier.submit(self._copy, source[:n_bytes], into[:n_bytes], ready)]

    def mark(self) -> Happening:
        done: Future[Any] = Future()
        done.set_result(self.link.mark())
        return [done]

    def wait(self, event: Happening) -> None:
        start, paused = time.perf_counter(), self.link.pause()
        moments = [_result(part) for part in event]
        self._wait_seconds += time.perf_counter() - start
        for moment in moments:
            if moment is not None:
                self.link.hold(moment, paused)

    def close(self) -> Moved:
        """-> what was done."""
        try:
            try:
                self._stop()
            except KeyboardInterrupt:  # is heard when nothing moves any more
                self._stop()
                raise
            waited = self.link.waited_seconds()
        finally:
            self.link.close()
        seconds = self._wait_seconds if waited is None else waited
        return Moved(self._read_bytes, self._copied_bytes, self._pinned_bytes, seconds)

    def _stop(self) -> None:
        self._closed.set()
        pools = self._readers, self._copier, self._pinner
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in pools:
            pool.shutdown(wait=True)

    def _copy(self, source: Tensor, into: Tensor, after: Sequence[Happening]) -> Any:
        moments = [part.result() for event in after for part in event]
        if self._closed.is_set():
            return None
        with torch.inference_mode():
            return self.link.copy(source, into, [moment for moment in moments if moment is not None])

    def _when_ready(self, job: Job, after: Sequence[Happening]) -> None:
        """What a reader overwrites must really have been copied on."""
        for event in after:
            for part in event:
                moment = part.result()
                if moment is not None:
                    self.link.block(moment)
        if not self._closed.is_set():
            with torch.inference_mode():
                job()


def _result(part: Future[Any]) -> Any:
    """Of a job that may not be done. Not by `concurrent.futures.wait`: it takes the locks of all futures one by one,
    and an interrupt meanwhile would leave them taken, so that no reader ever ended."""
    while not part.done():
        with suppress(NotYet):
            part.exception(_PATIENCE_SECONDS)
    return part.result()
