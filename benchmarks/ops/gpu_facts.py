"""What the planner assumes of a GPU and nobody has measured: its link, pinning, and what a CUDA context takes.

    python benchmarks/ops/gpu_facts.py [--out benchmarks/results/NAME.json]

Each line is a fact; the last one is all of them as JSON. context_bytes: of the driver's count of this process, after
the first tensor, the first product in 16 and in 8 bits, and the first convolution, each with what it loads for good.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import card, need_cuda

from zimage_lite.memory.cuda import CudaLink
from zimage_lite.memory.hardware import gpu_here
from zimage_lite.memory.nvml import Nvml

COPY_BYTES, COPIES = 2**28, 5
PROPERTIES = ("name", "total_memory", "multi_processor_count", "clock_rate", "memory_clock_rate", "memory_bus_width",
              "L2_cache_size")  # fmt: skip


def facts() -> Iterator[tuple[str, Any]]:
    nvml = Nvml()
    before = nvml.used()
    yield "tools", {name: shutil.which(name) is not None for name in ("git", "gcc", "nvidia-smi")}
    yield "context_bytes", dict(loaded(lambda: nvml.used() - before)) if nvml.works else None
    properties = torch.cuda.get_device_properties(0)
    yield "properties", {name: getattr(properties, name, None) for name in PROPERTIES}
    yield "planned_as", str(gpu_here(torch.device("cuda", 0)))
    yield "card", card()
    pageable = torch.zeros(COPY_BYTES, dtype=torch.uint8)
    yield "pageable_gbps", copy_gbps(pageable)
    link = CudaLink(torch.device("cuda"))
    start = time.perf_counter()
    pinned = link.pin(pageable)
    yield "pin_seconds_per_gb", (time.perf_counter() - start) / COPY_BYTES * 1e9 if pinned else None
    yield "pinned_gbps", copy_gbps(pageable)
    link.close()
    yield "nvidia_smi", nvidia_smi()


def loaded(used: Callable[[], int]) -> Iterator[tuple[str, int]]:
    """-> after what, and the bytes then."""
    x = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    codes = x.char()
    firsts: dict[str, Callable[[], Any]] = {
        "tensor": lambda: x,
        "product": lambda: x @ x,
        "int8 product": lambda: torch._int_mm(codes, codes),
        "convolution": lambda: F.conv2d(x[None, None], x[None, None, :3, :3]),
    }
    for name, call in firsts.items():
        with suppress(RuntimeError):
            call()
        torch.cuda.synchronize()
        yield name, used()


def copy_gbps(host: torch.Tensor) -> float:
    """The best of a few, to the device."""
    there, seconds = torch.empty_like(host, device="cuda"), []
    for _ in range(COPIES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        there.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return COPY_BYTES / min(seconds) / 1e9


def nvidia_smi() -> list[str]:
    """Clocks, power and the link, as it tells them; nothing where it is missing."""
    with suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "-q", "-d", "CLOCK,POWER"]
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.splitlines()
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    need_cuda()
    found: dict[str, Any] = {}
    for name, value in facts():
        found[name] = value
        if name != "nvidia_smi":
            print(f"{name} {value}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
