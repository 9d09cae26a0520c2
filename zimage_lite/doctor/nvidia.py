"""What the NVIDIA driver says of itself and of its GPUs, without torch: that may be missing, or a build for CPUs.

Asked through NVML, the library behind nvidia-smi, which comes with every driver.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..memory.nvml import Memory, library


@dataclass(frozen=True)
class Card:
    """capability: (8, 6) for compute capability 8.6."""

    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Driver:
    """version: such as "560.94". cuda: the newest CUDA that it runs, (12, 6). cards: as nvidia-smi numbers them."""

    version: str
    cuda: tuple[int, int]
    cards: tuple[Card, ...]


def driver() -> Driver | None:
    """None where there is no NVIDIA driver, or none that answers."""
    nvml = library()
    with suppress(OSError):
        return _ask(nvml) if nvml else None
    return None


class _Refusal(OSError):
    """A call of NVML that returned another code than 0."""


def _ask(library: Any) -> Driver:
    """Raises OSError."""

    def call(name: str, *arguments: Any) -> None:
        try:
            code = getattr(library, name)(*arguments)
        except AttributeError as error:
            raise _Refusal(f"{name} is missing") from error
        if code:
            raise _Refusal(f"{name}: error {code}")

    call("nvmlInit_v2")
    try:
        version, cuda, count = ctypes.create_string_buffer(80), ctypes.c_int(), ctypes.c_uint()
        call("nvmlSystemGetDriverVersion", version, len(version))
        call("nvmlSystemGetCudaDriverVersion", ctypes.byref(cuda))
        call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        cards = tuple(_card(call, index) for index in range(count.value))
    finally:
        with suppress(OSError):
            call("nvmlShutdown")
    return Driver(version.value.decode(), (cuda.value // 1000, cuda.value % 1000 // 10), cards)


def _card(call: Callable[..., None], index: int) -> Card:
    handle, name, memory = ctypes.c_void_p(), ctypes.create_string_buffer(96), Memory()
    major, minor = ctypes.c_int(), ctypes.c_int()
    call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
    call("nvmlDeviceGetName", handle, name, len(name))
    call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
    call("nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor))
    return Card(name.value.decode(), (major.value, minor.value), memory.total, memory.free)
