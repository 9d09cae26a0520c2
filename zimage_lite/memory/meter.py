"""What was really used: time, resident memory and device memory of each phase."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from .workers import Moved

SAMPLE_SECONDS = 0.02
_STEPS_KEPT = 1000


@dataclass
class Meter:
    """phases: name -> sums "seconds", "read_bytes", "copied_bytes", "wait_seconds" (see `workers.Moved`); peaks
    "peak_rss_bytes" (sampled), "pinned_bytes", and on CUDA "peak_vram_bytes" (what the allocator gave out) and
    "peak_reserved_bytes" (what it took: the process holds that and the CUDA context). A phase may come several times.
    """

    phases: dict[str, dict[str, float]] = field(default_factory=dict)
    steps: int = 0  # of all images
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_STEPS_KEPT))  # the last ones, each

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if _cuda_in_use():
            import torch

            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with _highest_rss() as highest:
            yield
        self.add(name, seconds=round(time.perf_counter() - start, 3))
        self.reached(name, peak_rss_bytes=highest.rss_bytes)
        if _cuda_in_use():
            import torch

            peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            self.reached(name, peak_vram_bytes=peaks[0], peak_reserved_bytes=peaks[1])

    def moved(self, phase: str, moved: Moved) -> None:
        self.add(phase, read_bytes=moved.read_bytes, copied_bytes=moved.copied_bytes, wait_seconds=moved.wait_seconds)
        self.reached(phase, pinned_bytes=moved.pinned_bytes)

    def add(self, phase: str, **amounts: float) -> None:
        found = self.phases.setdefault(phase, {})
        for name, amount in amounts.items():
            found[name] = round(found.get(name, 0) + amount, 3)

    def reached(self, phase: str, **peaks: float) -> None:
        found = self.phases.setdefault(phase, {})
        for name, peak in peaks.items():
            found[name] = max(found.get(name, 0), peak)


def peak_rss_bytes() -> int:
    """Peak resident memory of this process since it started, as the operating system counts it: nothing is missed."""
    if sys.platform == "linux":  # not getrusage, whose peak begins with that of the program that started this one
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def rss_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


@dataclass(eq=False)
class _Highest:
    rss_bytes: int


@contextmanager
def _highest_rss() -> Iterator[_Highest]:
    """Yields the highest resident memory so far, looked up every 20 ms by a thread."""
    highest, done = _Highest(rss_bytes()), threading.Event()
    wanted = weakref.ref(highest)

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS) and (found := wanted()):  # nobody's, if an interrupt came before done.set
            found.rss_bytes = max(found.rss_bytes, rss_bytes())
            del found

    thread = threading.Thread(target=watch, daemon=True)
    try:
        thread.start()
        yield highest
    finally:
        done.set()
        if thread.is_alive():  # not if an interrupt came while it was started
            thread.join()


def _cuda_in_use() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()
