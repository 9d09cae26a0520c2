"""Plans: that they add up, that more never makes them slower, that refusals speak the truth, and what they promise."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest
from zimage_kernels._triton import HALF_RATE_SUMS

from zimage_lite import load
from zimage_lite.cli import run
from zimage_lite.config import FLOAT16_SUMS
from zimage_lite.errors import BudgetError, UserError
from zimage_lite.memory.gpus import GPUS, find_gpu, gpu_with
from zimage_lite.memory.machine import CUDA_CONTEXT_BYTES, Machine, Processor, Work, machine, processor
from zimage_lite.memory.placement import GRANULE_BYTES, nested_order
from zimage_lite.memory.plan import DEVICE, FILE, PAGEABLE, PINNED, Block, Budgets, Phase, Plan
from zimage_lite.memory.planner import budgets_in_force, plan_phases
from zimage_lite.memory.simulate import Passage, simulate
from zimage_lite.plan.job import LONG_PROMPT_TOKENS, Job
from zimage_lite.plan.model_sizes import true_model
from zimage_lite.plan.prediction import phases
from zimage_lite.plan.timeline import as_svg, as_text
from zimage_lite.units import parse_bytes

GB, GIB = 10**9, 2**30
SIZES = ((512, 512), (1024, 1024), (1536, 1536), (2048, 2048), (2048, 3072))
FORMATS = ("int8", "int4", "q8_0", "q4_k_m", "bf16", "nf4")
RAM = (8 * GB, 16 * GB, 32 * GB)
LAPTOP = find_gpu("RTX 3060 Laptop")
PLENTY = Budgets(10**15, 10**15)


Ways = list[list[Phase]]


@cache
def work(format_name: str, size: tuple[int, int] = (1024, 1024), dtype: str = "bf16", images: int = 1) -> Ways:
    there = replace(machine(LAPTOP, 16 * GB), gpu_dtype=dtype)
    return phases(true_model(format_name), Job(*size, images=images), there)


def denoise(format_name: str, size: tuple[int, int] = (1024, 1024)) -> Phase:
    return work(format_name, size)[1][0]


def test_sums_of_torch_cost_traffic() -> None:
    """On 7.5 those of each 8-bit product of a block are written and read: 4 bytes for each of 4 x 3840 + 2 x 10240 +
    3840 outputs of 4224 tokens. And newer GPUs, and 16 bits, have none."""
    turing, newer = (machine(find_gpu(name), 16 * GB) for name in ("RTX 2060 Laptop", "RTX 3060 Laptop"))
    job = Job(1024, 1024, prompt_tokens=(128,))

    def traffic(name: str, there: Machine) -> float:
        (phase,) = phases(true_model(name), job, there)[1]
        return phase.blocks[-1].work.traffic_bytes

    sums = 2 * 4 * 4224 * (5 * 3840 + 2 * 10240)
    assert traffic("int8", turing) - traffic("int8", newer) == sums
    assert traffic("bf16", turing) == traffic("bf16", newer)


# --- The simulation, by hand


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


def test_nested_order() -> None:
    for total in range(40):
        order = nested_order(total)
        assert sorted(order) == list(range(total))
    assert nested_order(8) == (0, 4, 2, 6, 1, 5, 3, 7)


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


# --- The grid


def check(made: Plan, budgets: Budgets) -> None:
    assert made.peak_vram_bytes <= budgets.vram_bytes and made.peak_ram_bytes <= budgets.ram_bytes
    assert set(made.resident) | set(made.streamed) == set(made.homes) == set(made.sizes)
    assert list(made.streamed) == [name for name in made.homes if name not in made.resident]
    biggest = max((made.sizes[name] for name in made.streamed), default=0)
    assert biggest <= made.slot_bytes < biggest + GRANULE_BYTES
    if made.device == "gpu":
        assert made.fixed["CUDA context"] == CUDA_CONTEXT_BYTES
        least = sum(made.fixed.values()) + made.slots * made.slot_bytes + made.bytes_at(DEVICE)
        assert least <= made.peak_vram_bytes <= least + GRANULE_BYTES * (len(made.sizes) + 8) or made.prelude
        assert made.link_bytes == sum(made.sizes[name] for name in made.streamed)
        held = made.bytes_at(PINNED, PAGEABLE)
        assert made.peak_ram_bytes >= held + made.staging * made.staging_bytes
    assert made.disk_bytes == made.bytes_at(FILE)
    assert made.pass_ms >= max(made.demand_ms["compute"], 0) - 1e-6
    assert made.total_ms >= made.passes * made.demand_ms["compute"] - 1e-6


def check_timeline(made: Plan) -> None:
    """The order, and that no slot or worker is ever taken twice."""
    done = made.simulated()
    assert done.ends_ms == made.run.ends_ms
    computed = [event.name for event in done.events if event.worker == "compute"]
    assert computed == list(made.homes) * made.passes
    for worker in ("read", "copy", "compute"):
        own = [event for event in done.events if event.worker == worker]
        assert all(a.end_ms <= b.start_ms + 1e-9 for a, b in itertools.pairwise(own))
    taken: dict[int, float] = {}  # slot -> until when
    started: dict[tuple[str, int], float] = {}
    for event in done.events:
        if event.slot is None:
            assert event.worker == "read" or event.name in made.resident
        elif event.worker == "copy":
            place = event.pass_number * len(made.streamed) + made.streamed.index(event.name)
            assert event.slot == place % made.slots  # in turn, from one pass into the next
            assert event.start_ms >= taken.get(event.slot, 0.0) - 1e-9
            started[event.name, event.pass_number] = event.end_ms
        else:
            assert event.start_ms >= started[event.name, event.pass_number] - 1e-9
            taken[event.slot] = event.end_ms


def named(line: str) -> list[dict[str, int]]:
    """Every pair of budgets that a refusal names: {"vram": bytes}, {"ram": bytes} or both."""
    text = line.split("the smallest that works is ")[1]
    found = []
    for choice in text.split(" or "):
        vram = re.search(r"--vram (\S+)|(\S+) of GPU memory", choice)
        ram = re.search(r"--ram (\S+)|(\S+) of RAM", choice)
        sizes = {"vram": vram, "ram": ram}
        found.append({name: parse_bytes(match[1] or match[2]) for name, match in sizes.items() if match})
    return found


def plan_or_learn(todo: Ways, there: Machine, budgets: Budgets) -> list[Plan]:
    """A refusal must name budgets that work, and a little less must not."""
    try:
        return plan_phases(todo, there, budgets)
    except BudgetError as error:
        choices = named(str(error))
    assert choices
    for choice in choices:
        enough = replace(
            budgets,
            vram_bytes=choice.get("vram", budgets.vram_bytes),
            ram_bytes=choice.get("ram", budgets.ram_bytes),
        )
        for made in plan_phases(todo, there, enough):
            check(made, enough)
        for name, n_bytes in choice.items():
            with pytest.raises(BudgetError):
                plan_phases(todo, there, replace(enough, **{f"{name}_bytes": n_bytes - 10**8}))
    return []


@pytest.mark.parametrize("format_name", FORMATS)
def test_every_plan_adds_up(format_name: str) -> None:
    """All GPUs, sizes and RAM: sums, slots, order, peaks; more RAM is never slower; refusals are true."""
    for size, gpu in itertools.product(SIZES, GPUS):
        before: list[float] = []
        for ram in RAM:
            there = machine(gpu, ram)
            budgets = budgets_in_force(there)
            plans = plan_or_learn(work(format_name, size, there.gpu_dtype), there, budgets)
            assert plans or not before, "less RAM was enough"
            for made in plans:
                check(made, budgets)
            if plans and ram == RAM[0]:
                check_timeline(plans[1])
            times = [made.total_ms for made in plans]
            assert all(new <= old + 1e-5 for new, old in zip(times, before, strict=False))
            before = times


@pytest.mark.parametrize("gpu", [gpu.name for gpu in GPUS[::6]])
@pytest.mark.parametrize("format_name", FORMATS)
def test_more_is_never_slower(format_name: str, gpu: str) -> None:
    """Memory of the GPU, RAM, link and disk, each alone."""
    phase, there = denoise(format_name, (512, 512)), machine(find_gpu(gpu), 32 * GB, ideal=True)

    def grows(cases: list[tuple[Machine, Budgets]]) -> None:
        times = [plan_phases([[phase]], one, budgets)[0].total_ms for one, budgets in cases]
        assert all(b <= a + 1e-5 for a, b in itertools.pairwise(times)), times
        assert times[-1] <= times[0]

    grows([(there, Budgets(vram * 10**8, 5 * GB)) for vram in range(17, 80, 3)])
    grows([(there, Budgets(25 * 10**8, ram * 10**8)) for ram in range(25, 160, 9)])
    windows = replace(there, pinned_limit_bytes=3 * GB)
    grows([(windows, Budgets(25 * 10**8, ram * 10**8)) for ram in range(25, 160, 19)])
    tight = Budgets(25 * 10**8, 5 * GB)
    grows([(replace(there, link_gbps=gbps), tight) for gbps in (3.0, 6.0, 12.5, 25.0, 50.0)])
    grows([(replace(there, disk_gbps=gbps), tight) for gbps in (0.1, 0.5, 2.5, 5.0)])


def test_both_budgets_may_be_named() -> None:
    """Where neither alone would do."""
    with pytest.raises(BudgetError) as caught:
        plan_phases(work("int8"), machine(LAPTOP, 16 * GB), Budgets(10**8, 10**8))
    (choice,) = named(str(caught.value))
    assert set(choice) == {"vram", "ram"} and caught.value.exit_code == 3


# --- What is promised at 1024x1024


def step(format_name: str, free_gib: float | None, ideal: bool) -> Plan:
    there = machine(LAPTOP, 16 * GB, ideal=ideal)
    if free_gib is not None:
        there = replace(there, vram_free_bytes=int(free_gib * GIB))
    budgets = PLENTY if free_gib is None else budgets_in_force(there)
    return plan_phases([[denoise(format_name)]], there, budgets)[0]


def test_int4_is_resident_with_5_gib_free() -> None:
    assert not step("int4", 5.0, ideal=False).streamed


@pytest.mark.parametrize("ideal", [False, True])
@pytest.mark.parametrize(("format_name", "free_gib"), [("int8", 5.0), ("int4", 3.2)])
def test_streaming_costs_little(format_name: str, free_gib: float, ideal: bool) -> None:
    """Also if every kernel ran at its peak, so that there is less to hide behind."""
    streaming, resident = step(format_name, free_gib, ideal), step(format_name, None, ideal)
    assert streaming.streamed and not resident.streamed
    assert streaming.pass_ms <= 1.15 * resident.pass_ms
    assert streaming.total_ms <= 1.15 * resident.total_ms


@pytest.mark.parametrize("format_name", ["int8", "int4"])
def test_2_gib_are_enough(format_name: str) -> None:
    budgets = Budgets(2 * GIB, 16 * GB)
    plans = plan_phases(work(format_name), machine(LAPTOP, 16 * GB), budgets)
    for made in plans:
        check(made, budgets)


@pytest.mark.parametrize("format_name", ["int8", "int4"])
def test_the_smallest_that_works(format_name: str) -> None:
    """All on the GPU, at little cost: the goal was 2 GiB."""
    there, todo = machine(LAPTOP, 16 * GB), work(format_name)
    with pytest.raises(BudgetError) as caught:
        plan_phases(todo, there, Budgets(GB // 2, 16 * GB))
    smallest = named(str(caught.value))[0]["vram"]
    assert smallest <= 1.4 * GIB
    plans, free = (plan_phases(todo, there, Budgets(vram, 16 * GB)) for vram in (smallest, 6 * GB))
    assert [made.device for made in plans] == ["gpu"] * 3
    assert sum(made.total_ms for made in plans) <= 1.25 * sum(made.total_ms for made in free)


def test_large_images_decode_on_small_gpus() -> None:
    for format_name in ("int8", "int4"):
        plans = plan_phases(work(format_name, (2048, 3072)), machine(LAPTOP, 16 * GB), Budgets(6 * GB, 16 * GB))
        assert plans[2].device == "gpu" and plans[2].way.rows_per_band == 64


def test_float16_decodes_in_bands() -> None:
    """Which scale their maps."""
    todo = work("int8", (512, 512), dtype="fp16")
    assert machine(find_gpu("RTX 2060 Laptop"), 16 * GB).gpu_dtype == "fp16"
    made = plan_phases(todo, machine(LAPTOP, 16 * GB), PLENTY)[2]
    assert made.device == "gpu" and made.way.rows_per_band


def test_rates_are_those_of_the_roofline() -> None:
    """One int8 block at 1024x1024 ideally takes an RTX 3060 Laptop 14.3 ms for its linears and 6.6 for attention, half
    of which is in 16 bits, beside 973 MB of traffic."""
    gpu = machine(LAPTOP, 16 * GB, ideal=True).gpu
    assert gpu is not None
    block = next(block for block in denoise("int8").blocks if block.name == "layers.3")
    assert gpu.milliseconds(replace(block.work, traffic_bytes=0)) == pytest.approx(14.3 + 6.6, abs=0.1)
    assert block.work.traffic_bytes == pytest.approx(973e6, rel=0.01)


def test_float16_sums_are_planned_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernels have them. They double the rate of weights x values on GeForce, and nothing else."""
    assert {10 * major + minor for major, minor in FLOAT16_SUMS} == set(HALF_RATE_SUMS)
    tops, tflops = LAPTOP.tops8[1], LAPTOP.tflops16[1]
    assert processor(LAPTOP, ideal=True).attention8 == pytest.approx(2 / (1 / tops + 1 / (2 * tflops)))
    monkeypatch.setattr("zimage_lite.memory.machine.FLOAT16_SUMS", set())
    assert processor(LAPTOP, ideal=True).attention8 == pytest.approx(2 / (1 / tops + 1 / tflops))
    assert processor(LAPTOP, ideal=True).attention16 == tflops


@pytest.mark.parametrize(("format_name", "times"), [("int4", 1), ("q4_k_m", 2), ("nf4", 2)])
def test_reencoding_is_traffic(format_name: str, times: int) -> None:
    """Packed bytes in, a byte for each weight out; twice that where much is computed in between."""
    plain, packed = (
        next(block for block in denoise(name).blocks if block.name == "layers.3") for name in ("int8", format_name)
    )
    moved = plain.n_bytes + packed.n_bytes
    more = packed.work.traffic_bytes - plain.work.traffic_bytes
    assert more == pytest.approx(times * moved, rel=0.05)


# --- GPUs, the verb, the pictures


@pytest.mark.parametrize(
    ("text", "name"),
    [("RTX 3060 Laptop", "RTX 3060 Laptop 6GB"), ("3060 laptop 6gb", "RTX 3060 Laptop 6GB"),
     ("NVIDIA GeForce RTX 3060 Laptop GPU", "RTX 3060 Laptop 6GB"), ("rtx3060", "RTX 3060 12GB"),
     ("GeForce RTX 4070Ti (12 GB)", "RTX 4070 Ti 12GB"), ("3050 mobile 4 GB", "RTX 3050 Laptop 4GB"),
     ("NVIDIA H200 141GB", "H200 141GB"), ("NVIDIA H100 80GB HBM3", "H100 80GB"), ("4090", "RTX 4090 24GB"),
     ("NVIDIA GeForce RTX 2060 with Max-Q Design", "RTX 2060 Laptop 6GB")],
)  # fmt: skip
def test_gpus_are_found(text: str, name: str) -> None:
    assert find_gpu(text).name == name


@pytest.mark.parametrize(
    ("text", "near"),
    [("3050 laptop", "RTX 3050 Laptop 4GB, RTX 3050 Laptop 6GB"), ("RTX 4070", "RTX 4070 Laptop 8GB, RTX 4070 Ti 12GB"),
     ("Voodoo 2", "RTX 2060 Laptop 6GB"), ("", "H200 141GB"), ("RTX 4061", "RTX 4060 Laptop 8GB")],
)  # fmt: skip
def test_unknown_gpus_list_near_ones(text: str, near: str) -> None:
    with pytest.raises(UserError, match=near):
        find_gpu(text)


def test_gpu_with() -> None:
    assert gpu_with(6 * GB).name == "GTX 1660 Ti Laptop 6GB"
    assert gpu_with(7 * GB).vram_gib == 8 and gpu_with(10**15) is GPUS[-1]


def test_timeline(tmp_path: Path) -> None:
    made = plan_phases([[denoise("int8")]], machine(LAPTOP, 16 * GB), Budgets(4 * GB, 16 * GB))[0]
    copy, compute = as_text(made)
    assert copy.startswith("copy") and compute.startswith("compute") and len(copy) == len(compute)
    assert set(compute.split()[1]) == {"#", "0", "1"}  # compute never waits
    svg = ElementTree.fromstring(as_svg(made, "a < b"))
    assert sum(element.tag.endswith("rect") for element in svg.iter()) > 40


def test_the_verb(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "step.svg"
    arguments = ["plan", "--gpu", "3060 laptop", "--format", "int4", "--vram", "3GB", "--plot", str(picture), "--json"]
    assert run(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("A prediction, nothing was run: Z-Image-Turbo in int4, 1024x1024, 8 steps")
    result = json.loads(captured.out)
    assert result["gpu"] == "RTX 3060 Laptop 6GB" and result["vram_bytes"] == 3 * GB
    assert [phase["phase"] for phase in result["phases"]] == ["encode", "denoise", "decode"]
    assert all(phase["peak_vram_bytes"] <= 3 * GB for phase in result["phases"])
    assert result["phases"][1]["way"] == 1 and not result["phases"][2]["way"]["spilled"]
    fast, slow = result["phases"][1]["pass_ms"]
    assert fast < slow
    assert picture.read_text(encoding="utf-8").startswith("<svg")


def test_the_verb_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--vram", "1.8GB", "--width", "512", "--height", "512", "--count", "8"]
    assert run(["plan", "--gpu", "4050 laptop", *sizes, "--json"]) == 0
    captured = capsys.readouterr()
    assert "8 images of 512x512" in captured.err
    assert re.search(r"denoise .*compute +\d images at once\n", captured.err)
    assert re.search(r"decode .*compute +whole image\n", captured.err)
    result = json.loads(captured.out)
    assert result["count"] == 8 and result["phases"][2]["passes"] == 8
    assert result["phases"][1]["way"] > 1 and result["phases"][2]["way"]["rows_per_band"] == 0


def test_the_verb_refuses(refused, tiny: Path) -> None:
    assert "RTX 4070 Ti" in refused("plan", "--gpu", "4070")
    line = refused("plan", "--gpu", "RTX 3060 Laptop", "--vram", "1GB", code=3)
    assert named(line)[0]["vram"] <= 2 * GIB
    refused("plan", "--gpu", "RTX 3060 Laptop", "--format", "int5")
    refused("plan", "--gpu", "RTX 3060 Laptop", "--plot", "step.png")
    refused("plan", "--gpu", "RTX 3060 Laptop", "--count", "0")
    refused("plan", "--gpu", "RTX 3060 Laptop", "--model", tiny, "--format", "int8")


def test_a_model_folder_has_its_own_sizes(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--vram", "2GB", "--model", str(tiny), "--width", "64", "--height", "64", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == "tiny (bf16)" and result["vram_bytes"] == 2 * GB
    assert list(result["phases"][1]["homes"]) == [f"noise_refiner.{i}" for i in (0, 1)] + [
        f"layers.{i}" for i in range(3)
    ]


def test_the_verb_says_what_generate_plans(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the same machine and budgets, for a prompt as long as the verb assumes. Here the CPU stands in for the GPU:
    it does what was planned."""
    there = replace(machine(LAPTOP, 16 * GB), name="here", vram_free_bytes=4 * GB, process_bytes=GB // 2)
    monkeypatch.setattr("zimage_lite.cli.plan._here", lambda: (LAPTOP, there))
    monkeypatch.setattr("zimage_lite.plan.retry.machine_here", lambda *_: there)
    asked = ["--width", "96", "--height", "64", "--steps", "2", "--count", "3", "--ram", "3GB", "--json"]
    model = load(tiny, device="cpu").model
    prompt = next(text for n in range(999) if len(model.tokenizer.encode(text := "9" * n)) == LONG_PROMPT_TOKENS)
    vram_bytes, resident = 3 * GB, list[int]()
    for _ in range(2):
        limits = [*asked, "--model", str(tiny), "--vram", f"{vram_bytes}b"]
        assert run(["plan", *limits]) == 0
        said = {phase["phase"]: phase for phase in json.loads(capsys.readouterr().out)["phases"]}
        assert run(["generate", prompt, *limits, "--device", "cpu", "-o", str(tmp_path / "x.png")]) == 0
        done = json.loads(capsys.readouterr().out)["phases"]
        assert list(said) == list(done) and said["denoise"]["device"] == "gpu"
        for name, phase in done.items():
            assert {"peak_vram_bytes", "peak_ram_bytes", "blocks", "way", "fixed"} < set(phase["planned"])
            for fact, value in phase["planned"].items():
                expected = said[name][fact]
                expected = round(expected[0], 1) if fact.endswith("_ms") else expected  # at the highest power limit
                assert value == expected, (name, fact)
        resident.append(said["denoise"]["blocks"]["device"])
        vram_bytes = said["denoise"]["peak_vram_bytes"] - 1  # the second time too little for all blocks
    assert resident[0] == 5 and resident[1] < 5


def test_a_cpu_that_multiplies_in_8_bits() -> None:
    """int8 as it is, other integers re-encoded to one block of int8 in memory, which takes time, too; what is not made
    of integers is unpacked as on any CPU."""
    plain = Machine("a CPU", 16 * GB)
    fast = replace(plain, cpu=replace(plain.cpu, linear8=2 * plain.cpu.linear16), cpu_int8=True)
    job = Job(512, 512, prompt_tokens=(128,))
    for name, in_int8, is_reencoded in (("int8", True, False), ("q4_k_m", True, True), ("fp8", False, False)):
        (before,), (after,) = (phases(true_model(name), job, there)[1] for there in (plain, fast))
        layers = [[b for b in phase.blocks if b.name.startswith("layers.")] for phase in (before, after)]
        works = [[block.work for block in of] for of in layers]  # q4_k_m keeps the noise refiner in 16 bits
        assert not any(work.int8 for work in works[0]) and all(work.int8 == in_int8 for work in works[1])
        scratch = dict(after.fixed)["re-encoded block"]
        block_weights = 4 * 3840**2 + 3 * 3840 * 10240
        assert block_weights <= scratch < 1.001 * block_weights if is_reencoded else scratch == 0
        others = [phase_works[0].other_flops for phase_works in works]
        assert (others[1] > others[0]) == is_reencoded and (others[1] < others[0]) == (name == "int8")
        times = [sum(map(there.cpu.milliseconds, of)) for there, of in zip((plain, fast), works, strict=True)]
        assert (times[1] < times[0]) == in_int8


def test_planning_loads_no_torch() -> None:
    code = "import sys, zimage_lite.memory.planner; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
