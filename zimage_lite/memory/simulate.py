"""Three workers on a virtual clock: one reads from the disk, one copies over the link, one computes.

Each takes the blocks in the order they run, pass after pass, and as far ahead of the next worker as there is room:

    read     starts when a staging buffer is free, which its last occupant's copy frees
    copy     starts when the block has been read and its slot is free, which its last occupant's compute frees
    compute  starts when the block has been copied

The first time every block comes from the disk. What stays on the device is never read or copied again, what is held
in pinned memory never read again. Every time is a maximum of sums of durations, so no block that becomes faster, and no
further slot, can ever make the end later: that is what makes plans monotone.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Passage:
    """What one block takes. stays: on the device once it is there; the others pass through slots.

    first_read_ms: from the disk, the first time; read_ms: later, 0 if it is held where copies can start.
    """

    name: str
    compute_ms: float
    copy_ms: float = 0.0
    read_ms: float = 0.0
    first_read_ms: float = 0.0
    stays: bool = False


@dataclass(frozen=True)
class Event:
    """worker: "read", "copy" or "compute". slot: None for blocks that stay."""

    worker: str
    name: str
    pass_number: int
    slot: int | None
    start_ms: float
    end_ms: float


@dataclass(frozen=True)
class Run:
    """ends_ms: when the last block of each pass is done."""

    ends_ms: tuple[float, ...]
    events: tuple[Event, ...] = ()

    @property
    def total_ms(self) -> float:
        return self.ends_ms[-1]

    @property
    def pass_ms(self) -> float:
        """One pass once all is under way; the only one, if there is just one."""
        if len(self.ends_ms) == 1:
            return self.ends_ms[0]
        return (self.ends_ms[-1] - self.ends_ms[0]) / (len(self.ends_ms) - 1)


def simulate(
    passages: Sequence[Passage], slots: int, staging: int, passes: int, record: bool = False,
    idle: Sequence[Container[str]] = (),
) -> Run:  # fmt: skip
    """slots: of the device, for blocks that do not stay; staging: buffers between disk and link; idle: for each pass
    the blocks that do not run in it; empty: all run in all."""
    reader = link = compute = 0.0
    slot_free, staging_free = [0.0] * slots, [0.0] * max(staging, 1)
    streamed = staged = 0  # so many have passed through slots and staging buffers, over all passes
    ends, events, met = [], [], set[str]()
    for number in range(passes):
        for block in passages:
            if idle and block.name in idle[number]:
                continue
            first, slot = block.name not in met, None
            if first or not block.stays:
                met.add(block.name)
                ready = 0.0
                read_ms = block.first_read_ms if first else block.read_ms
                through_staging = block.stays or block.read_ms > 0  # else it is read to where it stays pinned
                if read_ms:
                    start = reader
                    if through_staging:
                        start = max(start, staging_free[staged % len(staging_free)])
                    ready = reader = start + read_ms
                    if record:
                        events.append(Event("read", block.name, number, None, start, reader))
                start = max(link, ready)
                if not block.stays:
                    slot = streamed % slots
                    start = max(start, slot_free[slot])
                link = start + block.copy_ms
                if record and block.copy_ms:
                    events.append(Event("copy", block.name, number, slot, start, link))
                if read_ms and through_staging:
                    staging_free[staged % len(staging_free)] = link
                    staged += 1
                compute = max(compute, link)
            start, compute = compute, compute + block.compute_ms
            if record:
                events.append(Event("compute", block.name, number, slot, start, compute))
            if slot is not None:
                slot_free[slot] = compute
                streamed += 1
        ends.append(compute)
    return Run(tuple(ends), tuple(events))
