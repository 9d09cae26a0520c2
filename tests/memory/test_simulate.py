"""The simulation of copies beside computing, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from zimage_lite.memory.simulate import Passage, simulate


def passages(*durations: tuple[float, float], stays: str = "") -> list[Passage]:
    """(compute, copy) of each block; stays: their numbers."""
    return [Passage(str(i), *times, stays=str(i) in stays) for i, times in enumerate(durations)]


def test_all_resident_is_pure_compute() -> None:
    done = simulate(passages((5, 2), (7, 2), (3, 2), stays="012"), slots=0, staging=1, passes=4)
    # The first pass: copies end at 2, 4, 6; the first block computes from 2 to 7, and hides the others.
    assert done.ends_ms == (17, 32, 47, 62)
    assert done.pass_ms == 15


@pytest.mark.parametrize("slots", [2, 3])
def test_all_streamed_and_slow_copies_is_pure_copy(slots: int) -> None:
    done = simulate(passages((1, 10), (2, 10), (3, 10)), slots, staging=1, passes=5)
    assert done.ends_ms == (33, 63, 93, 123, 153)
    assert done.pass_ms == 30


def test_one_slot_takes_turns() -> None:
    done = simulate(passages((4, 10), (6, 10)), slots=1, staging=1, passes=3)
    assert done.ends_ms == (30, 60, 90)


def test_a_copy_hides_behind_a_block_that_stays() -> None:
    """Alternating: each copy of 6 has the 4 of its own kind and the 4 of the next one that stays to hide behind."""
    blocks = passages((4, 6), (4, 6), (4, 6), (4, 6), stays="02")
    done = simulate(blocks, slots=2, staging=1, passes=4)
    assert done.pass_ms == 16
    slower = simulate([replace(p, copy_ms=10) for p in blocks], slots=2, staging=1, passes=4)
    assert slower.pass_ms == 20  # two copies of 10


def test_the_disk_is_a_worker_of_its_own() -> None:
    """Reads of 10, copies of 2, compute of 3, two staging buffers: the disk never waits."""
    blocks = [Passage(str(i), 3, 2, read_ms=10, first_read_ms=10) for i in range(3)]
    assert simulate(blocks, slots=2, staging=2, passes=3).ends_ms == (35, 65, 95)
    # With one buffer, the next read waits until the last one is copied.
    assert simulate(blocks, slots=2, staging=1, passes=3).ends_ms == (39, 75, 111)
    # Held in pinned memory, they are read once, and then only computing takes time.
    held = [replace(block, read_ms=0) for block in blocks]
    assert simulate(held, slots=2, staging=1, passes=3).ends_ms == (35, 44, 53)
