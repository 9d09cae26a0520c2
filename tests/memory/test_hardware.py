"""What is free on this machine, and what is made of a GPU that the driver describes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zimage_lite.memory import hardware
from zimage_lite.memory.gpus import Gpu
from zimage_lite.memory.hardware import ALLOCATOR_SLACK_BYTES, RAM_MARGIN_BYTES, Hardware
from zimage_lite.memory.machine import ALLOCATOR_ROUNDING_BYTES, CUDA_CONTEXT_BYTES
from zimage_lite.memory.planner import budgets_in_force

GIB = 2**30
CPU = Hardware(torch.device("cpu"), torch.float32)


def described(
    monkeypatch: pytest.MonkeyPatch, name: str, gib: float, capability: tuple[int, int], units: int = 0, **clocks: int
) -> Gpu:
    """clocks: in kHz and bits, as torch passes them on."""
    facts: Any = SimpleNamespace(name=name, total_memory=int(gib * GIB), multi_processor_count=units, **clocks)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    return hardware.gpu_here(torch.device("cuda"))


@pytest.mark.parametrize(
    ("name", "gib", "capability", "row"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, (9, 0), "H100 80GB"),
        ("NVIDIA H200", 139.8, (9, 0), "H200 141GB"),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", 5.8, (8, 6), "RTX 3060 Laptop 6GB"),
        ("NVIDIA GeForce RTX 3050 Laptop GPU", 4.0, (8, 6), "RTX 3050 Laptop 4GB"),
        ("GeForce GTX 1660 Ti", 6.0, (7, 5), "GTX 1660 Ti Laptop 6GB"),
        ("NVIDIA GeForce RTX 2060", 5.9, (7, 5), "RTX 2060 Laptop 6GB"),
        ("NVIDIA GeForce RTX 2060 with Max-Q Design", 5.9, (7, 5), "RTX 2060 Laptop 6GB"),
    ],
)
def test_drivers_names(
    name: str, gib: float, capability: tuple[int, int], row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before RTX 30 a laptop's chip is called as a desktop's."""
    assert described(monkeypatch, name, gib, capability).name == row


@pytest.mark.parametrize(
    ("name", "gib", "capability", "units", "clock", "memory", "expected"),
    [  # the makers' figures: int8 TOPS, 16-bit TFLOPS with 32-bit sums, GB/s
        ("NVIDIA H100 PCIe", 79.6, (9, 0), 114, 1_620_000, (1_593_000, 5120), (1513, 756, 2039)),
        ("NVIDIA A100-SXM4-80GB", 79.2, (8, 0), 108, 1_410_000, (1_593_000, 5120), (624, 312, 2039)),
        ("NVIDIA GeForce RTX 3080", 10.0, (8, 6), 68, 1_710_000, (9_501_000, 320), (238, 59.5, 760)),
        ("NVIDIA GeForce RTX 2060", 12.0, (7, 5), 34, 1_650_000, (7_001_000, 192), (114.9, 28.7, 336)),
        ("NVIDIA GeForce GTX 1650", 4.0, (7, 5), 14, 1_560_000, (4_001_000, 128), (11.2, 2.8, 128)),
        ("Quadro T1000", 4.0, (7, 5), 14, 1_455_000, (4_001_000, 128), (10.4, 2.6, 128)),
    ],
)
def test_a_card_that_is_not_in_the_table(
    name: str, gib: float, capability: tuple[int, int], units: int, clock: int, memory: tuple[int, int],
    expected: tuple[float, float, float], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    clocks = {"clock_rate": clock, "memory_clock_rate": memory[0], "memory_bus_width": memory[1]}
    gpu = described(monkeypatch, name, gib, capability, units, **clocks)
    assert gpu.name == name and gpu.capability == capability and gpu.vram_gib == round(gib)
    assert (gpu.tops8[0], gpu.tflops16[1], gpu.memory_gbps) == pytest.approx(expected, rel=0.01)
    assert gpu.fp16_sums == (1.0 if capability in ((8, 0), (9, 0)) else 2.0)


def test_where_torch_passes_on_less(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = described(monkeypatch, "NVIDIA GeForce RTX 4080", 16.0, (8, 9), 76)
    assert gpu.memory_gbps == 200 and gpu.tops8[0] == pytest.approx(76 * 1.5 * 2.048)


@pytest.mark.parametrize(("system", "held"), [("linux", 10**9), ("win32", 10**8)])
def test_what_is_free_is_asked_last(system: str, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the context and the code that products load are there. What they take, and what torch holds, is this
    process's. With other models of it nobody can plan; what is small is among what is assumed for the context. Windows
    keeps more for its desktop."""
    described(monkeypatch, "NVIDIA GeForce RTX 3090", 24.0, (8, 6))
    asked, total = list[str](), 24 * GIB

    def noting(name: str, answer: Any) -> None:
        monkeypatch.setattr(torch.cuda, name, lambda *_: asked.append(name) or answer)

    noting("empty_cache", None)
    noting("memory_reserved", held)
    noting("mem_get_info", (20 * GIB, total))
    monkeypatch.setattr(hardware, "_link_gbps", lambda device: asked.append("link") or 12.5)
    monkeypatch.setattr(hardware, "_load_libraries", lambda *_: asked.append("products"))
    monkeypatch.setattr(sys, "platform", system)
    here = hardware.machine_here(hardware.Hardware(torch.device("cuda"), torch.bfloat16))
    assert asked[:2] == ["link", "products"] and asked[-1] == "mem_get_info"
    assert here.vram_free_bytes == 20 * GIB + held + CUDA_CONTEXT_BYTES
    assert here.context_bytes == CUDA_CONTEXT_BYTES + held * (held > ALLOCATOR_ROUNDING_BYTES)
    assert here.margin_bytes == (int(0.08 * total) if system == "win32" else 300_000_000)


def test_products_are_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where torch has no int8 product."""
    calls = []
    monkeypatch.setattr(torch, "_int_mm", lambda *_: calls.append(1) or (_ for _ in ()).throw(RuntimeError("none")))
    hardware._load_libraries.cache_clear()
    for _ in range(2):
        hardware._load_libraries(torch.device("cpu"), torch.float32)
    assert calls == [1]
    hardware._load_libraries.cache_clear()


def test_what_is_free_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process holds already counts as free for it, and as held."""
    monkeypatch.setattr(hardware, "rss_bytes", lambda: 3 * 10**8)
    monkeypatch.setattr(hardware.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**10, total=2 * 10**10))
    there = hardware.machine_here(CPU)
    assert there.ram_free_bytes == 3 * 10**8 + 10**10 - RAM_MARGIN_BYTES and there.gpu is None
    assert there.process_bytes == 3 * 10**8 + ALLOCATOR_SLACK_BYTES
    given = budgets_in_force(there, ram_bytes=10**9)
    assert (given.ram_bytes, given.ram_limit) == (10**9, "--ram")
    for too_much in (None, 10**12):
        free = budgets_in_force(there, ram_bytes=too_much)
        assert free.ram_bytes == there.ram_free_bytes and not free.ram_limit.startswith("--")


_LOADING = """
import sys, torch
from zimage_lite.api import load
from zimage_lite.memory.hardware import LOOPS_BYTES, Hardware, machine_here
from zimage_lite.memory.meter import rss_bytes
from zimage_lite.quant.formats import FORMATS

cpu = Hardware(torch.device("cpu"), torch.float32)
before, planned = rss_bytes(), machine_here(cpu).loops_bytes
FORMATS["int8"].codec.quantize(torch.randn(64, 256), {"group": 256})
assert planned == LOOPS_BYTES and machine_here(cpu).loops_bytes == 0
print(rss_bytes() - before)
"""


@pytest.mark.slow  # compiles
def test_loops_that_are_to_be_loaded_are_counted(tmp_path: Path) -> None:
    """Also the first time, when they are compiled; and not much more than they ever take."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", _LOADING], capture_output=True, text=True, env=environment, check=True)
    assert hardware.LOOPS_BYTES / 3 <= int(done.stdout) <= hardware.LOOPS_BYTES
