"""A plan is enforced: torch's allocator, which is pretended here, gets no more than it says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.cuda._utils import _get_device_index

from zimage_lite.config import RuntimeOptions
from zimage_lite.errors import BudgetError
from zimage_lite.memory.ceiling import held_to
from zimage_lite.memory.gpus import find_gpu
from zimage_lite.memory.hardware import Hardware
from zimage_lite.memory.machine import (
    ALLOCATOR_ROUNDING_BYTES,
    CUDA_CONTEXT_BYTES,
    Work,
    machine,
    vram_margin_bytes,
)
from zimage_lite.memory.plan import CONTEXT, Block, Phase, Plan
from zimage_lite.plan.retry import LESS_AFTER_OOM, Planning, Ways

GB = 10**9
TOTAL = 6 * 2**30
CUDA = Hardware(torch.device("cuda"), torch.bfloat16)
PHASE = Phase("denoise", tuple(Block(str(i), 200_000_000, Work(1e12)) for i in range(30)), passes=8)


class Allocator:
    """What is set, and one that runs out at what it may take."""

    def __init__(self, fraction: float = 1.0) -> None:
        self.fractions = [fraction]

    def installed(self, monkeypatch: pytest.MonkeyPatch) -> Allocator:
        facts = SimpleNamespace(total_memory=TOTAL)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", self.fraction)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self.set_fraction)
        return self

    def fraction(self, device: torch.device) -> float:
        _get_device_index(device)  # as torch's does: raises ValueError for one without a number
        return self.fractions[-1]

    def set_fraction(self, fraction: float, device: torch.device) -> None:
        _get_device_index(device)
        self.fractions.append(fraction)

    @property
    def limit_bytes(self) -> float:
        return self.fractions[-1] * TOTAL

    def take(self, n_bytes: float) -> None:
        if n_bytes > self.limit_bytes:
            raise torch.OutOfMemoryError("CUDA out of memory")


THERE = machine(find_gpu("RTX 3060 Laptop"), 16 * GB)


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    monkeypatch.setattr("zimage_lite.plan.retry.machine_here", lambda hardware, int8: THERE)
    return Allocator().installed(monkeypatch)


def planned(vram_bytes: int, told: list[str]) -> tuple[Planning, Ways]:
    planning = Planning(CUDA, RuntimeOptions(vram_bytes=vram_bytes), told.append)
    return planning, planning.planned([lambda _: [PHASE]])[0]


def room(plan: Plan) -> float:
    return plan.peak_vram_bytes - CUDA_CONTEXT_BYTES + ALLOCATOR_ROUNDING_BYTES


def test_an_overshoot_is_planned_again(allocator: Allocator) -> None:
    """What takes more than its plan runs out of memory, as if there were no more, and goes on with a smaller plan. The
    limit is that of whichever plan runs, and gone when it is done."""
    told: list[str] = []
    planning, ways = planned(4 * GB, told)
    first, limits = ways.plan, list[float]()

    def run(done: int, plan: Plan) -> Iterator[int]:
        for number in range(done, 3):
            limits.append(allocator.limit_bytes)
            allocator.take(room(plan) + (1 if plan is first and number == 1 else 0))
            yield number

    assert list(planning.within(ways, run)) == [0, 1, 2]
    assert ways.plan.peak_vram_bytes <= LESS_AFTER_OOM * first.peak_vram_bytes
    assert limits == pytest.approx([room(first)] * 2 + [room(ways.plan)] * 2)
    assert allocator.fractions[-1] == 1.0
    assert len(told) == 1 and told[0].startswith("denoise: memory ran out, although ")


def test_what_others_of_the_process_hold(allocator: Allocator, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI's models, say: their place is not planned with, and the limit, which is of all tensors together, is above
    them. What is ours when memory runs out, a LoRA in training, is in the plan already."""
    holding = [GB, 2 * GB]
    monkeypatch.setattr(
        "zimage_lite.plan.retry.machine_here",
        lambda hardware, int8: replace(THERE, context_bytes=CUDA_CONTEXT_BYTES + holding.pop(0)),
    )
    planning, ways = planned(4 * GB, [])
    arena = ways.plan.slots * ways.plan.slot_bytes + sum(ways.plan.sizes[name] for name in ways.plan.resident)
    assert ways.plan.peak_vram_bytes <= 4 * GB and arena <= 3 * GB - CUDA_CONTEXT_BYTES
    with held_to(ways.plan, CUDA.device):
        allocator.take(GB + arena)
    again = planning.planned_again(ways)
    assert again.fixed[CONTEXT] == CUDA_CONTEXT_BYTES + GB and not holding


def test_twice_is_a_refusal(allocator: Allocator) -> None:
    planning, ways = planned(4 * GB, [])

    def run(done: int, plan: Plan) -> Iterator[int]:
        allocator.take(room(plan) + 1)
        yield 0

    with pytest.raises(BudgetError, match="memory ran out twice"):
        list(planning.within(ways, run))
    assert allocator.fractions[-1] == 1.0


def test_a_reader_that_leaves_takes_the_limit_away(allocator: Allocator) -> None:
    planning, ways = planned(4 * GB, [])
    reader = planning.within(ways, lambda done, plan: iter(range(3)))
    assert next(reader) == 0 and allocator.limit_bytes == pytest.approx(room(ways.plan))
    reader.close()
    assert allocator.fractions[-1] == 1.0


def test_a_lower_limit_stays(allocator: Allocator) -> None:
    """A benchmark holds its process to a smaller card."""
    _, ways = planned(4 * GB, [])
    allocator.fractions.append(0.25)
    with held_to(ways.plan, CUDA.device):
        assert allocator.fractions[-1] == 0.25
    assert allocator.fractions[-1] == 0.25


def test_what_runs_on_the_cpu_has_no_limit(allocator: Allocator) -> None:
    _, ways = planned(4 * GB, [])
    with held_to(ways.plan, torch.device("cpu")):
        assert allocator.fractions == [1.0]
    on_cpu = Planning(CUDA.on_cpu(), RuntimeOptions(), lambda line: None)
    plan = on_cpu.planned([lambda _: [Phase("encode", PHASE.blocks, device="cpu")]])[0].plan
    with held_to(plan, CUDA.device):
        assert allocator.fractions == [1.0]


@pytest.mark.parametrize(
    ("total_gib", "windows", "margin"), [(4, False, 300e6), (4, True, 343.6e6), (2, True, 300e6), (24, True, 2061.6e6)]
)
def test_windows_keeps_more(total_gib: int, windows: bool, margin: float) -> None:
    assert vram_margin_bytes(total_gib * 2**30, windows) == pytest.approx(margin, rel=1e-3)
