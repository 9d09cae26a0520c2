"""NVML, spoken to through ctypes: a fake library answers, for no driver is needed to test what is asked."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest

from zimage_lite.doctor import nvidia
from zimage_lite.doctor.nvidia import Card, Driver
from zimage_lite.memory.nvml import Nvml


class FakeNvml:
    """One card of 8.6 behind a driver for CUDA 12.6. missing: a call that this version lacks; broken: one that
    fails."""

    def __init__(self, missing: str = "", broken: str = "") -> None:
        self.missing, self.broken, self.open = missing, broken, 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name == self.missing:
            raise AttributeError(name)
        return lambda *arguments: 15 if name == self.broken else self.answer(name, arguments)

    def answer(self, name: str, arguments: tuple[Any, ...]) -> int:
        if name in ("nvmlInit_v2", "nvmlShutdown"):
            self.open += 1 if name == "nvmlInit_v2" else -1
        elif name == "nvmlSystemGetDriverVersion":
            arguments[0].value = b"560.94"
        elif name == "nvmlSystemGetCudaDriverVersion":
            arguments[0]._obj.value = 12060
        elif name == "nvmlDeviceGetCount_v2":
            arguments[0]._obj.value = 1
        elif name == "nvmlDeviceGetName":
            arguments[1].value = b"RTX 3060"
        elif name == "nvmlDeviceGetMemoryInfo":
            memory = arguments[1]._obj
            memory.total, memory.free, memory.used = 6 * 2**30, 2**30, 5 * 2**30
        elif name == "nvmlDeviceGetCudaComputeCapability":
            arguments[1]._obj.value, arguments[2]._obj.value = 8, 6
        return 0


def test_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeNvml()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert nvidia.driver() == Driver("560.94", (12, 6), (Card("RTX 3060", (8, 6), 6 * 2**30, 2**30),))
    assert library.open == 0


@pytest.mark.parametrize(
    "fault", [{"missing": "nvmlInit_v2"}, {"broken": "nvmlInit_v2"}, {"broken": "nvmlDeviceGetName"}]
)
def test_a_driver_that_does_not_answer(fault: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeNvml(**fault)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert nvidia.driver() is None
    assert library.open == 0


@pytest.mark.parametrize("fault", ["", "nvmlInit_v2", "nvmlDeviceGetHandleByIndex_v2"])
def test_what_is_used(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeNvml(broken=fault))
    nvml = Nvml()
    assert (nvml.works, nvml.used()) == ((False, 0) if fault else (True, 5 * 2**30))


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert nvidia.driver() is None and (Nvml().works, Nvml().used()) == (False, 0)
