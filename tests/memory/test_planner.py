"""Small plans, by hand: where blocks live, and which way is taken."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from plans import GB, LAPTOP, named, work

from zimage_lite.errors import BudgetError
from zimage_lite.memory.machine import Machine, Processor, Work, machine
from zimage_lite.memory.placement import GRANULE_BYTES
from zimage_lite.memory.plan import DEVICE, FILE, PAGEABLE, PINNED, Block, Budgets, Phase
from zimage_lite.memory.planner import _Clock, plan_phases

# --- Small plans, by hand


def small(n_blocks: int = 10, megabytes: int = 100, compute_ms: float = 10, passes: int = 8) -> Phase:
    blocks = [Block(f"b{i}", megabytes * 10**6, Work(compute_ms * 1e9)) for i in range(n_blocks)]
    return Phase("denoise", tuple(blocks), passes, fixed={"activations": 10 * GRANULE_BYTES})


def plain_machine(link_gbps: float = 10.0, **facts: int | float | None) -> Machine:
    """1 TFLOP/s."""
    gpu = Processor(1, 1, 1, 1, 1e9)
    return Machine("test", 10**12, 10**12, gpu, link_gbps=link_gbps, **facts)  # type: ignore[arg-type]


def test_homes_follow_the_ram() -> None:
    """A GPU with room for two slots: 10 blocks stream; RAM for 7 of them, of which 4 may be pinned
    beside the two staging buffers."""
    there = plain_machine(process_bytes=0, context_bytes=0, pinned_limit_bytes=650 * 10**6)
    budgets = Budgets(10 * GRANULE_BYTES + 2 * 50 * GRANULE_BYTES, (2 + 7) * 10**8)
    (made,) = plan_phases([[small()]], there, budgets)
    homes = list(made.homes.values())
    assert [homes.count(home) for home in (DEVICE, PINNED, PAGEABLE, FILE)] == [0, 4, 3, 3]
    assert (made.slots, made.staging) == (2, 2)
    assert made.disk_bytes == 3 * 10**8 and made.link_bytes == 10**9
    assert made.peak_ram_bytes == budgets.ram_bytes and made.peak_vram_bytes <= budgets.vram_bytes
    assert made.bound_by == "disk"  # 300 MB at 2.5 GB/s and 300 MB at 6 GB/s against 100 ms of compute and of link


def test_on_the_cpu_the_ram_is_the_device() -> None:
    there = replace(plain_machine(), gpu=None, process_bytes=0)
    (made,) = plan_phases([[replace(small(megabytes=200), device="cpu")]], there, Budgets(0, 1121 * 10**6))
    assert made.device == "cpu" and made.peak_vram_bytes == 0
    assert len(made.resident) == 3 and made.slots == 2 and made.peak_ram_bytes <= 1121 * 10**6
    assert set(made.homes.values()) == {DEVICE, FILE}


@pytest.mark.parametrize("idle_in", [range(0), range(3), range(2, 8), range(8)])
def test_what_is_ruled_out_would_be_no_faster(idle_in: range, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some blocks do not run in some passes. Without the lower bound every candidate is simulated."""
    some = frozenset({"b0", "b3", "b4", "b9"})
    phase = replace(small(), idle=tuple(some if i in idle_in else frozenset[str]() for i in range(8)))
    there = plain_machine(link_gbps=6.0, process_bytes=0, context_bytes=0)
    budgets = [Budgets(vram * 10**8, ram * 10**8) for vram, ram in ((3, 4), (5, 5), (8, 12), (12, 12))]
    found = [plan_phases([[phase]], there, one)[0] for one in budgets]
    monkeypatch.setattr(_Clock, "at_least_ms", lambda self, candidate, spare: 0.0)
    for made, one in zip(found, budgets, strict=True):
        assert plan_phases([[phase]], there, one)[0].total_ms == pytest.approx(made.total_ms, abs=1e-5)
        assert made.total_ms <= plan_phases([[small()]], there, one)[0].total_ms + 1e-5


# --- Ways of doing the same


def ways(*facts: tuple[str, int, float]) -> list[Phase]:
    """(name, MB of GPU memory, ms) of each: one block that stays."""
    blocks = [Block("b", 2 * GRANULE_BYTES, Work(ms * 1e9, launches=0)) for _, _, ms in facts]
    return [
        Phase("decode", (block,), fixed={"maps": 10**6 * megabytes}, way=name)
        for block, (name, megabytes, _) in zip(blocks, facts, strict=True)
    ]


def test_the_fastest_way_that_fits() -> None:
    there = plain_machine(process_bytes=0, context_bytes=0)
    choices = ways(("slow", 100, 9), ("large", 900, 3), ("first", 500, 4), ("second", 400, 4))
    for megabytes, name in ((1000, "large"), (600, "first"), (450, "second"), (110, "slow")):
        (made,) = plan_phases([choices], there, Budgets(megabytes * 10**6, GB))
        assert made.way == name
    with pytest.raises(BudgetError, match=r"decode does not fit .* is --vram 0.2GB"):
        plan_phases([choices], there, Budgets(90 * 10**6, GB))


def test_a_way_on_the_cpu_is_one_of_them() -> None:
    there = replace(plain_machine(process_bytes=0, context_bytes=0), cpu=Processor(0.1, 0.1, 0.1, 0.1, 1e9))
    on_gpu = ways(("gpu", 900, 3))[0]
    choices = [on_gpu, replace(on_gpu, device="cpu", way="cpu")]
    assert plan_phases([choices], there, Budgets(GB, GB))[0].way == "gpu"
    slow = plan_phases([choices], there, Budgets(0, GB))[0]
    assert (slow.way, slow.device, slow.peak_vram_bytes) == ("cpu", "cpu", 0)
    with pytest.raises(BudgetError) as caught:
        plan_phases([choices], there, Budgets(0, GB // 2))
    assert named(str(caught.value)) == [{"vram": GB}, {"ram": GB}]


def test_batches_where_copies_are_slow() -> None:
    """Two images double the work of a step but not its copies."""
    fast, slow = (replace(machine(LAPTOP, 32 * GB), link_gbps=gbps) for gbps in (25.0, 4.0))
    budgets = Budgets(3 * GB, 32 * GB)
    todo = work("int8", (512, 512), images=8)
    assert [phase.way for phase in todo[1]] == [1, 2, 4, 8]
    assert [phase.way for phase in work("int8", (512, 512), images=3)[1]] == [1, 2]
    chosen = plan_phases(todo, slow, budgets)[1]
    one_by_one = plan_phases([todo[1][:1]], slow, budgets)[0]
    assert chosen.way > 1 and chosen.passes == 8 * -(-8 // chosen.way)
    assert chosen.total_ms < one_by_one.total_ms / 2  # 5.7 GB at 4 GB/s against 270 ms of compute for each image
    # Nothing to gain where copies are hidden: a larger batch is charged more than it saves.
    assert plan_phases(todo, fast, Budgets(10 * GB, 32 * GB))[1].way == 1


@pytest.mark.parametrize("link_gbps", [3.0, 6.0, 12.5])
def test_more_memory_is_never_slower_with_batches(link_gbps: float) -> None:
    todo = work("int8", (512, 512), images=8)
    there = replace(machine(LAPTOP, 32 * GB), link_gbps=link_gbps)
    plans = [plan_phases(todo, there, Budgets(vram * 10**8, 16 * GB)) for vram in range(15, 90, 5)]
    for phase in zip(*plans, strict=True):
        times = [made.total_ms for made in phase]
        assert all(b <= a + 1e-5 for a, b in itertools.pairwise(times)), times
    assert len({made[1].way for made in plans}) > 1
