"""Where phases work: the machine, the budgets, and the record of what a call used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ..config import RuntimeOptions
from ..memory.hardware import Hardware
from ..memory.machine import Machine
from ..memory.meter import Meter
from ..memory.plan import Phase, Plan
from ..plan.retry import Planning, Tell
from .weights import Component, Weights, opened

Progress = Callable[[str, int, int], None]  # phase, done, total
WaysOn = Callable[[Machine], Sequence[Phase]]  # the ways to do a phase on a machine


def silent(*_: object) -> None:
    """No progress display, no notes."""


@dataclass
class Workspace:
    """What encode, denoise and decode share. plans: by phase; of several, the one that takes the most.
    int8: the transformer multiplies in 8 bits. machine: see `Planning`."""

    hardware: Hardware
    options: RuntimeOptions
    tell: Tell = silent
    meter: Meter = field(default_factory=Meter)
    plans: dict[str, Plan] = field(default_factory=dict)
    int8: bool = False
    machine: Machine | None = None

    def begin(self) -> None:
        """A call's record starts empty."""
        self.meter, self.plans = Meter(), {}

    @property
    def planning(self) -> Planning:
        return Planning(self.hardware, self.options, self.tell, self.int8, self.machine)

    def hardware_of(self, plan: Plan) -> Hardware:
        """The GPU's work may be done by the CPU beside it."""
        return self.hardware.on_cpu() if plan.device == "cpu" and self.hardware.device.type == "cuda" else self.hardware

    def note(self, plan: Plan) -> None:
        """Keep it for the record."""
        most = self.plans.get(plan.phase, plan)
        self.plans[plan.phase] = max(plan, most, key=lambda p: (p.peak_vram_bytes, p.peak_ram_bytes))

    @contextmanager
    def open(self, component: Component, plan: Plan) -> Iterator[Weights]:
        """Its weights as planned, with the time and memory that it takes while they are open."""
        self.note(plan)
        with self.meter.phase(plan.phase):
            with opened(component, plan, self.hardware_of(plan)) as weights:
                yield weights
            for moved in weights.moved:
                self.meter.moved(plan.phase, moved)

    def give_back(self) -> None:
        """What the allocator keeps of the GPU's memory for later."""
        if self.hardware.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass
class Count:
    """Tells how far a phase is."""

    progress: Progress
    phase: str
    total: int
    done: int = 0

    def add(self, count: int = 1) -> None:
        self.done = min(self.done + count, self.total)  # after a second attempt some come twice
        self.progress(self.phase, self.done, self.total)
