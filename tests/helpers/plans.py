"""Phases of the true model on a laptop, and the budgets that a refusal names."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

from zimage_lite.memory.gpus import find_gpu
from zimage_lite.memory.machine import machine
from zimage_lite.memory.plan import Phase
from zimage_lite.plan.job import Job
from zimage_lite.plan.model_sizes import true_model
from zimage_lite.plan.prediction import phases
from zimage_lite.units import parse_bytes

GB, GIB = 10**9, 2**30
LAPTOP = find_gpu("RTX 3060 Laptop")
Ways = list[list[Phase]]


@cache
def work(format_name: str, size: tuple[int, int] = (1024, 1024), dtype: str = "bf16", images: int = 1) -> Ways:
    there = replace(machine(LAPTOP, 16 * GB), gpu_dtype=dtype)
    return phases(true_model(format_name), Job(*size, images=images), there)


def denoise(format_name: str, size: tuple[int, int] = (1024, 1024)) -> Phase:
    return work(format_name, size)[1][0]


def named(line: str) -> list[dict[str, int]]:
    """Every pair of budgets that a refusal names: {"vram": bytes}, {"ram": bytes} or both."""
    text = line.split("the smallest that works is ")[1]
    found = []
    for choice in text.split(" or "):
        vram = re.search(r"--vram (\S+)|(\S+) of GPU memory", choice)
        ram = re.search(r"--ram (\S+)|(\S+) of RAM", choice)
        sizes = {"vram": vram, "ram": ram}
        found.append({name: parse_bytes(match[1] or match[2]) for name, match in sizes.items() if match})
    return found
