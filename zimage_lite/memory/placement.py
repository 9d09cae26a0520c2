"""Every way to keep some blocks on a device and to pass the others through slots.

The list depends on the blocks alone, never on a budget: a planner that takes the fastest of those that fit can only get
faster when there is more room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..units import round_up

MIB = 2**20
GRANULE_BYTES = 2 * MIB  # CUDA hands out memory in pieces of this size
SLOT_COUNTS = (2, 3, 1)  # in the order they are tried: one cannot overlap, a third helps where sizes are uneven
_MOST_SIZES = 4  # so many different block sizes are told apart


@dataclass(frozen=True)
class Candidate:
    """Indices of blocks. n_bytes: of resident blocks and slots together."""

    resident: frozenset[int]
    streamed: tuple[int, ...]
    slots: int
    slot_bytes: int
    n_bytes: int
    streamed_bytes: int


@lru_cache(maxsize=256)
def candidates(sizes: tuple[int, ...], slot_counts: tuple[int, ...], granule: int) -> tuple[Candidate, ...]:
    """In the order in which equally fast ones are preferred: two slots before three before one, which has no slack,
    then the most resident blocks first.

    A slot is as large as the largest block that passes through it, so where a few blocks are larger than the rest, as
    16-bit refiners are, it can pay to keep those and to have smaller slots.
    """
    rounded = [round_up(size, granule) for size in sizes]
    found: dict[tuple[frozenset[int], int], Candidate] = {}
    for limit in sorted(set(rounded), reverse=True)[:_MOST_SIZES]:
        large = [i for i, size in enumerate(rounded) if size > limit]
        rest = [i for i, size in enumerate(rounded) if size <= limit]
        for kept in range(len(rest) + 1):
            resident = frozenset(large + [rest[i] for i in spread(len(rest), kept)])
            streamed = tuple(i for i in range(len(sizes)) if i not in resident)
            slot = max((rounded[i] for i in streamed), default=0)
            held = sum(rounded[i] for i in resident)
            passing = sum(sizes[i] for i in streamed)
            for count in slot_counts if streamed else (0,):
                if count <= len(streamed) and (resident, count) not in found:
                    found[resident, count] = Candidate(resident, streamed, count, slot, held + count * slot, passing)
    if not sizes:
        return (Candidate(frozenset(), (), 0, 0, 0, 0),)
    return tuple(sorted(found.values(), key=lambda c: (slot_counts.index(c.slots) if c.slots else 0, -len(c.resident))))


def spread(total: int, count: int) -> list[int]:
    """count of total places, evenly."""
    return [i * total // count for i in range(count)]


@lru_cache(maxsize=64)
def nested_order(total: int) -> tuple[int, ...]:
    """All places, such that those up to any point are spread about evenly (van der Corput's sequence)."""
    bits = max(total - 1, 0).bit_length()
    order = [int(f"{k:0{bits}b}"[::-1], 2) * total >> bits for k in range(2**bits)] if bits else [0] * total
    return tuple(dict.fromkeys(order))


def prefix(order: Sequence[int], sizes: Sequence[int], room: int) -> int:
    """How many of the first places fit into the room."""
    for count, place in enumerate(order):
        room -= sizes[place]
        if room < 0:
            return count
    return len(order)
