"""What the driver says is used of a GPU, context and all: torch's allocator only knows what it took itself."""

from __future__ import annotations

import ctypes
import sys
import threading
from contextlib import suppress
from typing import Any

_LIBRARIES = {"win32": ("nvml.dll", r"C:\Program Files\NVIDIA Corporation\NVSMI\nvml.dll")}  # the second: until 2019
_LIBRARY = ("libnvidia-ml.so.1",)


def library() -> Any | None:
    """NVML, loaded; None where there is no driver."""
    if sys.platform == "darwin":
        return None
    for name in _LIBRARIES.get(sys.platform, _LIBRARY):
        with suppress(OSError):
            return ctypes.CDLL(name)
    return None


class Memory(ctypes.Structure):
    """nvmlMemory_t"""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Nvml:
    """What the driver says is used of GPU 0, by all processes."""

    def __init__(self) -> None:
        self._nvml, self._device, self._memory = library(), ctypes.c_void_p(), Memory()
        self.works = self._nvml is not None and not self._nvml.nvmlInit_v2()
        if self._nvml and self.works:
            self.works = not self._nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self._device))

    def used(self) -> int:
        if not self._nvml or not self.works:
            return 0
        self._nvml.nvmlDeviceGetMemoryInfo(self._device, ctypes.byref(self._memory))
        return int(self._memory.used)


class Peak:
    """The highest use, looked up every 5 ms by a thread."""

    def __init__(self, nvml: Nvml | None) -> None:
        self.nvml, self.bytes, self._done = nvml, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        if self.nvml:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self.nvml:
            self._thread.join()

    def _watch(self) -> None:
        assert self.nvml
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, self.nvml.used())
