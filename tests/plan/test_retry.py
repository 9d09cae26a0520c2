"""What is planned within what is free; running out of memory is in tests/memory/test_ceiling.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from zimage_lite.config import RuntimeOptions
from zimage_lite.errors import BudgetError
from zimage_lite.memory.gpus import find_gpu
from zimage_lite.memory.hardware import probe
from zimage_lite.memory.machine import Machine, Work, machine
from zimage_lite.memory.plan import Block, Phase
from zimage_lite.plan.retry import Planning

GB = 10**9
HERE = replace(machine(find_gpu("RTX 3060 Laptop"), 16 * GB), gpu=None, cpu_int8=True, process_bytes=0)


def told(ram_bytes: int, compute: str = "auto") -> str:
    """The refusal of what takes 2 GB in 8 bits and 1 GB else."""

    def ways(there: Machine) -> list[Phase]:
        fixed = {"all": 2 * GB if there.cpu_int8 else GB}
        return [Phase("denoise", (Block("0", 1000, Work(1e9)),), device="cpu", fixed=fixed)]

    options = RuntimeOptions("cpu", ram_bytes=ram_bytes, compute=compute)
    with pytest.raises(BudgetError) as refused:
        Planning(probe("cpu"), options, lambda line: None, True, HERE).planned([ways])
    return str(refused.value)


def test_what_16_bits_would_hold_is_said() -> None:
    least = "denoise does not fit --ram: got 1.50 GB; the smallest that works is --ram 2.1GB"
    assert told(GB * 3 // 2) == f"{least}, or --compute 16bit, which takes less and is slower"
    assert told(GB * 3 // 2, "int8") == least
    assert "16bit" not in told(GB // 2)
