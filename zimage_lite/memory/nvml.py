"""What the driver says is used of a GPU, context and all: torch's allocator only knows what it took itself."""

from __future__ import annotations

import ctypes
import sys
import threading


class Nvml:
    """What the driver says is used of GPU 0, by all processes."""

    def __init__(self) -> None:
        self.works, self._device, self._memory = False, ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()
        try:
            self._library = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
            self.works = not self._library.nvmlInit_v2()
            self.works &= not self._library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self._device))
        except OSError:
            return

    def used(self) -> int:
        if not self.works:
            return 0
        self._library.nvmlDeviceGetMemoryInfo(self._device, self._memory)
        return int(self._memory[2])


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
