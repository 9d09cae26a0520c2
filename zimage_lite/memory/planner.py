"""Finds the fastest plan that keeps the budgets. Pure: no torch, no files.

It tries every candidate of every way that fits (they do not depend on the budgets), simulates those that could be the
best, and takes the fastest. So more memory, or a faster link, can never make a plan slower.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..errors import BudgetError
from ..units import format_gb, round_up
from .machine import COPY_OVERHEAD_MS, Machine, Processor, Work
from .placement import GRANULE_BYTES, SLOT_COUNTS, Candidate, candidates, nested_order, prefix
from .plan import CONTEXT, DEVICE, FILE, PAGEABLE, PINNED, Block, Budgets, Phase, Plan
from .simulate import Passage, Run, simulate


def plan_phases(phases: Sequence[Sequence[Phase]], machine: Machine, budgets: Budgets) -> list[Plan]:
    """phases: of each, its ways. The fastest plan of each phase; of equally fast ways, that of the first.

    Raises BudgetError, naming the smallest budgets that work for all of them."""
    found = [_fastest(ways, machine, budgets) for ways in phases]
    made = [plan for plan in found if plan is not None]
    if len(made) < len(phases):
        raise _refusal(phases, machine, budgets, phases[found.index(None)][0].name)
    return made


def budgets_in_force(machine: Machine, vram_bytes: int | None = None, ram_bytes: int | None = None) -> Budgets:
    """What is asked for, but never more than is free less a margin, so that nothing spills or swaps."""
    vram = machine.vram_free_bytes - machine.margin_bytes if machine.gpu else 0
    found = Budgets(max(vram, 0), machine.ram_free_bytes, "the free GPU memory", "the free memory")
    if vram_bytes is not None and vram_bytes <= vram:
        found = replace(found, vram_bytes=vram_bytes, vram_limit="--vram")
    if ram_bytes is not None and ram_bytes <= machine.ram_free_bytes:
        found = replace(found, ram_bytes=ram_bytes, ram_limit="--ram")
    return found


def _fastest(ways: Sequence[Phase], machine: Machine, budgets: Budgets) -> Plan | None:
    best = None
    for way in ways:
        best = _search(way, machine, budgets, best)
    return best


def _fixed(phase: Phase, machine: Machine) -> tuple[int, int]:
    """VRAM and RAM beside blocks, slots and staging buffers."""
    vram, ram = machine.context_bytes if machine.gpu else 0, machine.process_bytes + sum(phase.ram_fixed.values())
    if phase.device == "gpu":
        return vram + _rounded(*phase.fixed.values()), ram
    return vram, ram + sum(phase.fixed.values())


def _candidates(phase: Phase) -> tuple[Candidate, ...]:
    return candidates(tuple(block.n_bytes for block in phase.blocks), SLOT_COUNTS, GRANULE_BYTES)


def _arena_bytes(candidate: Candidate, phase: Phase) -> int:
    """Of resident blocks and slots. The prelude runs in the same place before they come."""
    return max(candidate.n_bytes, _rounded(max((block.n_bytes for block in phase.prelude), default=0)))


def _staging_bytes(phase: Phase) -> int:
    return max((block.n_bytes for block in (*phase.prelude, *phase.blocks)), default=0)


def _search(phase: Phase, machine: Machine, budgets: Budgets, best: Plan | None) -> Plan | None:
    """The fastest candidate of this way, if it is faster than `best`. Those that a lower bound rules out are not
    simulated."""
    gpu = phase.device == "gpu"
    vram, ram = _fixed(phase, machine)
    room, host_room = budgets.vram_bytes - vram, budgets.ram_bytes - ram
    if min(room, host_room) < 0:
        return best
    clock = _Clock.of(phase, machine)
    found = _candidates(phase)
    if phase.passes == 1:  # what runs once gains nothing by staying, neither here nor in pinned memory
        found = tuple(sorted(found, key=lambda c: (c.slots not in (0, SLOT_COUNTS[0]), c.n_bytes)))
    for candidate in found:
        if _arena_bytes(candidate, phase) > (room if gpu else host_room):
            continue
        for staging in (2, 1) if gpu else (0,):
            spare = host_room - staging * _staging_bytes(phase) if gpu else 0
            limit = best.total_ms - clock.prelude_ms - 1e-6 if best else math.inf
            if spare < 0 or clock.at_least_ms(candidate, spare) >= limit:
                continue
            held = spare if phase.passes > 1 else 0
            pinnable = held
            if machine.pinned_limit_bytes is not None:
                pinnable = min(held, machine.pinned_limit_bytes - staging * _staging_bytes(phase))
            homes = _homes(candidate, clock.sizes, held, pinnable)
            passages = tuple(clock.passages(homes))
            run = simulate(passages, candidate.slots, staging, phase.passes, idle=phase.idle)
            if clock.before_ms(homes) - clock.prelude_ms + run.total_ms < limit:
                best = _plan(phase, machine, candidate, homes, staging, clock, passages, run)
    return best


def _homes(candidate: Candidate, sizes: Sequence[int], spare: int, pinnable: int) -> list[str]:
    """Of each block: on the device, else pinned, else pageable, else in the file. Those of a kind are spread evenly.

    spare: bytes of RAM for blocks; pinnable: how many of them may be pinned.
    """
    homes = [DEVICE if i in candidate.resident else FILE for i in range(len(sizes))]
    order = [candidate.streamed[place] for place in nested_order(len(candidate.streamed))]
    pinned = prefix(order, sizes, pinnable)
    spare -= sum(sizes[i] for i in order[:pinned])
    pageable = prefix(order[pinned:], sizes, spare)
    for count, i in enumerate(order[: pinned + pageable]):
        homes[i] = PINNED if count < pinned else PAGEABLE
    return homes


@dataclass(frozen=True)
class _Clock:
    """How long each block of a phase takes each worker of a device, in milliseconds."""

    names: list[str]
    sizes: list[int]
    compute: list[float]
    copy: list[float]
    disk: list[float]  # nothing for the CPU, to which the disk is the link
    host_copy: list[float]
    making: list[float]  # what is read on the CPU into what is computed with, by all its threads
    again: list[int]  # how often it runs after the first time, -1 if it never does
    whole: int  # passes in which all run
    prelude_ms: float
    first_ms: float  # the first pass, if there were room for everything at once
    later_ms: float  # of computing, in all other passes

    @classmethod
    def of(cls, phase: Phase, machine: Machine) -> _Clock:
        sizes, gpu = [block.n_bytes for block in phase.blocks], phase.device == "gpu"
        processor: Processor | None = machine.gpu if gpu else machine.cpu
        assert processor is not None, "a way for a GPU, and there is none"
        link = machine.link_gbps if gpu else machine.disk_gbps

        def copy_ms(n_bytes: int) -> float:
            return n_bytes / link / 1e6 + COPY_OVERHEAD_MS

        def disk_ms(n_bytes: int) -> float:
            return n_bytes / machine.disk_gbps / 1e6 if gpu else 0.0

        def compute_ms(work: Work) -> float:
            return processor.milliseconds(work) + work.host_bytes / machine.host_copy_gbps / 1e6

        def passages(blocks: Sequence[Block]) -> list[Passage]:
            return [Passage(b.name, compute_ms(b.work), copy_ms(b.n_bytes), 0.0, disk_ms(b.n_bytes)) for b in blocks]

        def making_ms(block: Block) -> float:
            return machine.cpu.milliseconds(Work(0.0, other_flops=block.making_flops, launches=0))

        once, found = passages(phase.prelude), passages(phase.blocks)
        once = [replace(p, compute_ms=p.compute_ms + making_ms(b)) for p, b in zip(once, phase.prelude, strict=True)]
        prelude_ms = phase.read_once_bytes / machine.disk_gbps / 1e6
        idle = phase.idle or (frozenset[str](),) * phase.passes
        again = [sum(passage.name not in names for names in idle) - 1 for passage in found]
        computed = sum(passage.compute_ms for passage in found if passage.name not in idle[0])
        return cls(
            names=[passage.name for passage in found],
            sizes=sizes,
            compute=[passage.compute_ms for passage in found],
            copy=[passage.copy_ms for passage in found],
            disk=[passage.first_read_ms for passage in found],
            host_copy=[size / machine.host_copy_gbps / 1e6 for size in sizes],
            making=[making_ms(block) for block in phase.blocks],
            again=again,
            whole=sum(not names for names in idle),
            prelude_ms=prelude_ms + (simulate(once, 1, 1, phase.prelude_passes).total_ms if once else 0.0),
            first_ms=simulate(found, len(found), 1, 1, idle=idle).total_ms,
            later_ms=sum(p.compute_ms * (n + 1) for p, n in zip(found, again, strict=True)) - computed,
        )

    def passages(self, homes: Sequence[str]) -> Iterator[Passage]:
        for i, home in enumerate(homes):
            again = {FILE: self.disk[i], PAGEABLE: self.host_copy[i]}.get(home, 0.0)
            stays = home == DEVICE
            compute = self.compute[i] + (0.0 if stays else self.making[i])
            # What goes to pageable memory is put aside while the first pass copies it from the staging buffer.
            yield Passage(self.names[i], compute, self.copy[i], again, self.disk[i], stays)

    def before_ms(self, homes: Sequence[str]) -> float:
        """The prelude, and making what stays."""
        return self.prelude_ms + sum(ms for ms, home in zip(self.making, homes, strict=True) if home == DEVICE)

    def at_least_ms(self, candidate: Candidate, spare: int) -> float:
        """No way of running this candidate takes less: each worker needs so long if it never waits."""
        if not self.sizes:
            return 0.0
        ever = [i for i, again in enumerate(self.again) if again >= 0]
        copy = sum(self.copy[i] for i in ever)
        copy += sum(self.copy[i] * self.again[i] for i in candidate.streamed if self.again[i] > 0)
        missing = max(candidate.streamed_bytes - spare, 0) / max(sum(self.sizes), 1)
        read = sum(self.disk[i] for i in ever) + sum(self.disk) * max(self.whole - 1, 0) * missing
        return max(self.first_ms + self.later_ms, copy, read)


def _plan(
    phase: Phase, machine: Machine, candidate: Candidate, homes: list[str], staging: int, clock: _Clock,
    passages: tuple[Passage, ...], run: Run,
) -> Plan:  # fmt: skip
    vram, ram = _fixed(phase, machine)
    sizes = {block.name: block.n_bytes for block in phase.blocks}
    held = sum(size for size, home in zip(clock.sizes, homes, strict=True) if home in (PINNED, PAGEABLE))
    arena, gpu = _arena_bytes(candidate, phase), phase.device == "gpu"
    return Plan(
        phase=phase.name,
        device=phase.device,
        passes=phase.passes,
        homes=dict(zip(clock.names, homes, strict=True)),
        sizes=sizes,
        prelude=tuple(block.name for block in phase.prelude),
        slots=candidate.slots,
        slot_bytes=candidate.slot_bytes,
        staging=staging,
        staging_bytes=_staging_bytes(phase),
        fixed={CONTEXT: machine.context_bytes, **phase.fixed} if gpu else dict(phase.fixed),
        peak_vram_bytes=vram + (arena if gpu else 0),
        peak_ram_bytes=ram + (staging * _staging_bytes(phase) + held if gpu else arena),
        prelude_ms=clock.before_ms(homes),
        passages=passages,
        run=run,
        idle=phase.idle,
        way=phase.way,
        keeps=phase.keeps,
    )


def _refusal(phases: Sequence[Sequence[Phase]], machine: Machine, budgets: Budgets, phase: str) -> BudgetError:
    """Names the smallest --vram beside this --ram, and the other way round; both, if neither alone is enough."""
    corners = [[_least(way, machine) for way in ways] for ways in phases]

    def least(which: int, other_budget: int) -> int | None:
        fits = [[corner[which] for corner in options if corner[1 - which] <= other_budget] for options in corners]
        return max(min(options) for options in fits) if all(fits) else None

    vram, ram = least(0, budgets.ram_bytes), least(1, budgets.vram_bytes)
    told = [_told(vram, machine, 0)] if vram else []
    told += [_told(ram, machine, 1)] if ram else []
    if not told:
        ram = max(min(corner[1] for corner in options) for options in corners)
        vram = least(0, ram)
        assert vram is not None
        told = [f"{_told(vram, machine, 0)} with {_told(ram, machine, 1)}"]
    limits = f"{budgets.vram_limit} and {budgets.ram_limit}" if machine.gpu else budgets.ram_limit
    got = f"{format_gb(budgets.vram_bytes)} and {format_gb(budgets.ram_bytes)}"
    return BudgetError(
        f"{phase} does not fit {limits}",
        got=got if machine.gpu else format_gb(budgets.ram_bytes),
        fix=f"the smallest that works is {' or '.join(told)}",
    )


def _least(phase: Phase, machine: Machine) -> tuple[int, int]:
    """The smallest VRAM and RAM that will do; both at once."""
    vram, ram = _fixed(phase, machine)
    arena = min(_arena_bytes(candidate, phase) for candidate in _candidates(phase))
    return (vram + arena, ram + _staging_bytes(phase)) if phase.device == "gpu" else (vram, ram + arena)


def _told(n_bytes: int, machine: Machine, which: int) -> str:
    """As a flag if the machine has so much, else as what it would take."""
    enough = round_up(n_bytes, 100_000_000)
    text = f"{enough / 1e9:g}GB"
    free = (machine.vram_free_bytes - machine.margin_bytes, machine.ram_free_bytes)[which]
    flag, kind = (("--vram", "GPU memory"), ("--ram", "RAM"))[which]
    return f"{flag} {text}" if enough <= free else f"{text} of {kind}"


def _rounded(*sizes: int) -> int:
    return sum(round_up(size, GRANULE_BYTES) for size in sizes)
