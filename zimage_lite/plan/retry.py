"""Plans what is about to run within what is free now, and once more if memory runs out all the same."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from ..config import RuntimeOptions
from ..errors import BudgetError
from ..memory.ceiling import held_to
from ..memory.failures import forget, is_out_of_memory
from ..memory.hardware import Hardware, machine_here
from ..memory.machine import Machine
from ..memory.plan import CONTEXT, Budgets, Phase, Plan
from ..memory.planner import budgets_in_force, plan_phases
from ..units import format_gb

LESS_AFTER_OOM = 0.85  # of what did not fit is planned for the second time, or less if less is free

Tell = Callable[[str], None]  # takes a line for the user
_Item = TypeVar("_Item")


@dataclass
class Ways:
    """How a phase could be done, and how it will be."""

    phases: Sequence[Phase]
    plan: Plan


@dataclass(frozen=True)
class Planning:
    """machine: to plan for; None: this one, as it is whenever something is planned."""

    hardware: Hardware
    options: RuntimeOptions
    tell: Tell
    int8: bool = False  # the transformer multiplies in 8 bits
    machine: Machine | None = None

    def planned(self, todo: Sequence[Callable[[Machine], Sequence[Phase]]]) -> list[Ways]:
        """todo: for each phase, what ways there are on a machine. All fit the budgets. Raises BudgetError."""
        machine, budgets = self.now()
        try:
            return _planned(todo, machine, budgets)
        except BudgetError as error:
            if machine.cpu_int8 and self.options.compute == "auto":  # re-encoding compiles loops, which take memory
                with suppress(BudgetError):
                    _planned(todo, replace(machine, cpu_int8=False), budgets)
                    error.args = (f"{error}, or --compute 16bit, which takes less and is slower",)
            raise

    def within(self, ways: Ways, run: Callable[[int, Plan], Iterator[_Item]]) -> Generator[_Item, None, None]:
        """What run(done, plan) yields from its item `done` on. If memory runs out, because another program
        took it or the plan was too small, plans again with less, once, and goes on where it was. Raises BudgetError."""
        done = 0
        for again in (True, False):
            try:
                with held_to(ways.plan, self.hardware.device):
                    for item in run(done, ways.plan):
                        done += 1
                        yield item
                return
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                forget(error)  # a reader's future may hold it
            if again:  # out of the handler: the error itself is gone
                gc.collect()
                ways.plan = self.planned_again(ways)
        raise _ran_out(f"twice, although {_peaks(ways.plan)} were planned", ways.plan)

    def now(self) -> tuple[Machine, Budgets]:
        """The machine and the ceilings as they are now."""
        machine = self.machine or machine_here(self.hardware, self.int8)
        return machine, budgets_in_force(machine, self.options.vram_bytes, self.options.ram_bytes)

    def planned_again(self, ways: Ways) -> Plan:
        (machine, limits), old = self.now(), ways.plan
        if old.device == "gpu":
            machine = replace(machine, context_bytes=old.fixed[CONTEXT])  # what we hold by now is in the phase
            limits = replace(limits, vram_bytes=min(limits.vram_bytes, int(LESS_AFTER_OOM * old.peak_vram_bytes)))
        else:
            limits = replace(limits, ram_bytes=min(limits.ram_bytes, int(LESS_AFTER_OOM * old.peak_ram_bytes)))
        try:
            (plan,) = plan_phases([ways.phases], machine, limits)
        except BudgetError:
            raise _ran_out(f"although {_peaks(old)} were planned, and it cannot be done with less", old) from None
        why = f"memory ran out, although {_peaks(old)} were planned: another program took it, or it takes more"
        self.tell(f"{old.phase}: {why}; going on with {_peaks(plan)}")
        return plan


def _planned(todo: Sequence[Callable[[Machine], Sequence[Phase]]], machine: Machine, budgets: Budgets) -> list[Ways]:
    ways = [ways_on(machine) for ways_on in todo]
    return [Ways(way, plan) for way, plan in zip(ways, plan_phases(ways, machine, budgets), strict=True)]


def _ran_out(how: str, plan: Plan) -> BudgetError:
    advice = "close other programs, or name a smaller --vram or --ram, a smaller image or a smaller format"
    return BudgetError(f"{plan.phase}: memory ran out {how}", fix=advice)


def _peaks(plan: Plan) -> str:
    gpu = f"{format_gb(plan.peak_vram_bytes)} of GPU memory and " if plan.device == "gpu" else ""
    return f"{gpu}{format_gb(plan.peak_ram_bytes)} of RAM"
