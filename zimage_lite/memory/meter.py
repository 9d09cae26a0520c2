"""What was really used: time, peak resident memory and peak device memory of each phase."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_CLEAR_REFS, _RESET_PEAK = Path("/proc/self/clear_refs"), "5"  # see proc_pid_clear_refs(5)


@dataclass
class Meter:
    """phases: name -> {"seconds", "peak_rss_bytes", and on CUDA "peak_vram_bytes" (the allocator's)}."""

    phases: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        _reset_peaks()
        start = time.perf_counter()
        yield
        self.phases[name] = {"seconds": round(time.perf_counter() - start, 3), "peak_rss_bytes": peak_rss_bytes()}
        if _cuda_in_use():
            import torch

            self.phases[name]["peak_vram_bytes"] = torch.cuda.max_memory_allocated()

    @property
    def peak_rss_bytes(self) -> int:
        return int(max((phase["peak_rss_bytes"] for phase in self.phases.values()), default=peak_rss_bytes()))


def peak_rss_bytes() -> int:
    """Peak resident memory of this process: since the phase began on Linux, since the start elsewhere."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def rss_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def _reset_peaks() -> None:
    if sys.platform == "linux":
        with suppress(OSError):  # some containers forbid it; the peak then counts from the start of the process
            _CLEAR_REFS.write_text(_RESET_PEAK)
    if _cuda_in_use():
        import torch

        torch.cuda.reset_peak_memory_stats()


def _cuda_in_use() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()
