"""Who stays in memory, who passes through, and how long it takes: what `planner` decides, and what it decides from.

Pure functions of sizes and budgets: no torch, no files, the same answer on any computer.

A model is a few phases, one after another, and each may use the whole budget. A phase is a list of blocks that run in
order, pass after pass. A block that stays on the device saves its copy in every pass, so as many stay as fit; the
others pass through slots, spread evenly among those that stay, so that their copies hide behind compute. Those that
pass through are kept in pinned memory as far as the RAM goes, then in pageable memory, and the rest comes from the file
each time. Running on the CPU is the same with RAM for a device, and the disk for a link.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cached_property
from typing import Any, cast

from .machine import Work
from .simulate import Passage, Run, simulate

DEVICE, PINNED, PAGEABLE, FILE = "device", "pinned", "pageable", "file"
CONTEXT = "CUDA context"  # among what a plan on a GPU holds


@dataclass(frozen=True)
class Block:
    """n_bytes: where it stays, which is also what is copied. making_flops: what making that of the file takes
    the CPU each time it is read, in operations that take as long (see `Work.other_flops`)."""

    name: str
    n_bytes: int
    work: Work
    making_flops: float = 0.0


@dataclass(frozen=True)
class Phase:
    """One way of doing a phase. blocks run `passes` times, in order; those of prelude only `prelude_passes` times,
    before the others are there.

    device: "gpu" or "cpu", which computes. fixed: what else is held there while it runs, by name; ram_fixed: in RAM
    beside a GPU. read_once_bytes: what the CPU reads for itself before all that. idle: for each pass the blocks that do
    not run in it; empty: all run in all.
    way: what the caller calls this way; keeps: whether what is added to a block stays once it is made, while the block
    comes and goes. A plan carries both along.
    """

    name: str
    blocks: tuple[Block, ...]
    passes: int = 1
    prelude: tuple[Block, ...] = ()
    prelude_passes: int = 1
    read_once_bytes: int = 0
    device: str = "gpu"
    fixed: Mapping[str, int] = field(default_factory=dict)
    ram_fixed: Mapping[str, int] = field(default_factory=dict)
    idle: tuple[frozenset[str], ...] = ()
    way: Any = None
    keeps: bool = False


@dataclass(frozen=True)
class Budgets:
    """The ceilings in force for the whole process, and what sets them: a flag, or what the machine has."""

    vram_bytes: int
    ram_bytes: int
    vram_limit: str = "--vram"
    ram_limit: str = "--ram"


@dataclass(frozen=True)
class Plan:
    """One phase. homes: block -> where it waits to be computed. way, keeps, idle: of the `Phase` it was made from.
    Times are predictions."""

    phase: str
    device: str  # "gpu" or "cpu"
    passes: int
    homes: Mapping[str, str]
    sizes: Mapping[str, int]
    prelude: tuple[str, ...]
    slots: int
    slot_bytes: int
    staging: int
    staging_bytes: int
    fixed: Mapping[str, int]
    peak_vram_bytes: int
    peak_ram_bytes: int
    prelude_ms: float
    passages: tuple[Passage, ...]
    run: Run
    idle: tuple[frozenset[str], ...] = ()
    way: Any = None
    keeps: bool = False

    @cached_property
    def resident(self) -> frozenset[str]:
        return frozenset(name for name, home in self.homes.items() if home == DEVICE)

    @cached_property
    def streamed(self) -> tuple[str, ...]:
        """In the order they run."""
        return tuple(name for name, home in self.homes.items() if home != DEVICE)

    def bytes_at(self, *homes: str) -> int:
        return sum(self.sizes[name] for name, home in self.homes.items() if home in homes)

    @property
    def link_bytes(self) -> int:
        """Over the link in every pass of all blocks after the first."""
        return sum(self.sizes[name] for name in self.streamed) if self.device == "gpu" else 0

    @property
    def disk_bytes(self) -> int:
        """From the disk in every pass of all blocks after the first."""
        return self.bytes_at(FILE)

    @property
    def pass_ms(self) -> float:
        return self.run.pass_ms

    @property
    def total_ms(self) -> float:
        return self.prelude_ms + self.run.total_ms

    @property
    def startup_ms(self) -> float:
        """What the first pass takes longer, since every weight comes from the disk, and what runs before it."""
        return self.total_ms - self.passes * self.pass_ms

    @cached_property
    def demand_ms(self) -> dict[str, float]:
        """What each worker has to do in a pass of all blocks, if it never had to wait; in the only one, everything is
        read."""
        first, gpu = self.passes == 1, self.device == "gpu"
        moving = [p for p in self.passages if first or not p.stays]
        copies = sum(p.copy_ms for p in moving)
        reads = sum(p.first_read_ms if first else p.read_ms for p in moving) if gpu else copies
        compute = sum(p.compute_ms for p in self.passages)
        return {"compute": compute, "link": copies if gpu else 0.0, "disk": reads}

    @property
    def bound_by(self) -> str:
        demand = self.demand_ms
        return max(demand, key=lambda worker: demand[worker])

    def facts(self) -> dict[str, Any]:
        """As plain data. Times are predictions."""
        counts = {home: list(self.homes.values()).count(home) for home in (DEVICE, PINNED, PAGEABLE, FILE)}
        return {
            "device": self.device,
            "way": asdict(cast(Any, self.way)) if is_dataclass(self.way) else self.way,
            "passes": self.passes,
            "blocks": counts,
            "slots": self.slots,
            "slot_bytes": self.slot_bytes,
            "staging_bytes": self.staging * self.staging_bytes,
            "fixed": dict(self.fixed),
            "peak_vram_bytes": self.peak_vram_bytes,
            "peak_ram_bytes": self.peak_ram_bytes,
            "link_bytes_per_pass": self.link_bytes,
            "disk_bytes_per_pass": self.disk_bytes,
            "pass_ms": round(self.pass_ms, 1),
            "total_ms": round(self.total_ms, 1),
            "bound_by": self.bound_by,
        }

    def simulated(self) -> Run:
        """The same run with all its events."""
        return simulate(self.passages, self.slots, self.staging, self.passes, True, self.idle)

    def steady_pass(self) -> tuple[float, float]:
        """Start and end of a pass of all blocks to look at: the last but one, whose copies run ahead into the next."""
        whole = [n for n in range(self.passes) if not self.idle or not self.idle[n]] or list(range(self.passes))
        number, ends = whole[-2:][0], self.run.ends_ms
        return (ends[number - 1] if number else 0.0), ends[number]


def activation_bytes(
    tokens: int,
    dim: int,
    ffn_dim: int,
    n_heads: int,
    item_bytes: int,
    stream_bytes: int | None = None,
    q_dim: int | None = None,
    kv_dim: int | None = None,
    fused: bool = True,
) -> int:
    """Peak of one transformer block's activations, its input included. item_bytes: of what linears compute in;
    stream_bytes: of the residual stream, if it is wider. q_dim, kv_dim: of queries, and of keys or values; else dim.
    fused: queries and keys are normed and rotated in one go, first the queries.

    Either while keys are rotated in float32: residual, normed input, q, k and v, what came out for q, and the rotation
    itself, from float32 keys; if not fused, both normed before. Or in SwiGLU: residual before and after the attention,
    what the attention gave, normed input, and gate, up and their product. Beside either the angles, and scores: of 512
    tokens in float32 where no fused kernel takes the heads as they are, else tiles of some threads.
    """
    stream, q, kv = stream_bytes or item_bytes, q_dim or dim, kv_dim or dim
    # What it starts from, halves of the result, result. If not fused, the first is a copy, which float32 does without.
    rotation = (2 if item_bytes == 4 and not fused else 3) * 4 * q
    attention = dim * (stream + item_bytes) + (2 * q + (2 if fused else 3) * kv) * item_bytes + rotation
    product = tokens * ffn_dim
    widened = 8 * min(product, 2**20) if stream > item_bytes else 0  # float16 multiplies so many in float32 at a time
    feed_forward = (
        2 * tokens * dim * (stream + item_bytes) + 2 * product * item_bytes + max(product * item_bytes, widened)
    )
    angles = 4 * q // n_heads * (tokens + 1)  # and the weight of a head's norm
    return max(tokens * attention, feed_forward) + angles + n_heads * 2**20
