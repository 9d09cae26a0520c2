"""Plans: that they add up, that more never makes them slower, that refusals speak the truth, and what they promise."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from marking import always
from plans import GB, GIB, LAPTOP, Ways, denoise, named, work
from zimage_kernels._triton import HALF_RATE_SUMS

from zimage_lite.config import FLOAT16_SUMS
from zimage_lite.errors import BudgetError
from zimage_lite.memory.gpus import GPUS, find_gpu
from zimage_lite.memory.machine import CUDA_CONTEXT_BYTES, Machine, Work, machine, processor
from zimage_lite.memory.placement import GRANULE_BYTES
from zimage_lite.memory.plan import DEVICE, FILE, PAGEABLE, PINNED, Budgets, Plan
from zimage_lite.memory.planner import budgets_in_force, plan_phases
from zimage_lite.plan.job import Job
from zimage_lite.plan.model_sizes import true_model
from zimage_lite.plan.prediction import phases

SIZES = ((512, 512), (1024, 1024), (1536, 1536), (2048, 2048), (2048, 3072))
FORMATS = ("int8", "int4", "q8_0", "q4_k_m", "bf16", "nf4")
RAM = (8 * GB, 16 * GB, 32 * GB)
PLENTY = Budgets(10**15, 10**15)


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


@pytest.mark.slow  # thousands of plans
@pytest.mark.parametrize("format_name", always("int8", of=FORMATS))
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


@pytest.mark.slow  # thousands of plans
@pytest.mark.parametrize("gpu", [gpu.name for gpu in GPUS[::6]])
@pytest.mark.parametrize("format_name", always("q4_k_m", of=FORMATS))
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
    """One int8 block at 1024x1024 ideally takes an RTX 3060 Laptop 14.3 ms for its linears and 4.0 for attention (6.6
    if its 16-bit half were added up in float32), beside 973 MB of traffic."""
    gpu = machine(LAPTOP, 16 * GB, ideal=True).gpu
    assert gpu is not None
    block = next(block for block in denoise("int8").blocks if block.name == "layers.3")
    assert gpu.milliseconds(replace(block.work, traffic_bytes=0)) == pytest.approx(14.3 + 4.0, abs=0.1)
    assert block.work.traffic_bytes == pytest.approx(973e6, rel=0.01)


def test_float16_sums_are_planned_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernels have them. They double the rate of weights x values on GeForce, and nothing else."""
    assert {10 * major + minor for major, minor in FLOAT16_SUMS} == set(HALF_RATE_SUMS)
    tops, tflops = LAPTOP.tops8[1], LAPTOP.tflops16[1]
    assert processor(LAPTOP, ideal=True).attention8 == pytest.approx(2 / (1 / tops + 1 / (2 * tflops)))
    monkeypatch.setattr("zimage_lite.memory.machine.FLOAT16_SUMS", set())
    assert processor(LAPTOP, ideal=True).attention8 == pytest.approx(2 / (1 / tops + 1 / tflops))
    assert processor(LAPTOP, ideal=True).attention16 == tflops


def test_what_stays_is_reencoded_once_and_what_streams_in_each_pass() -> None:
    here, job = Machine("a CPU", 16 * GB, cpu_int8=True), Job(512, 512, prompt_tokens=(128,), steps=4)
    (ways,) = phases(true_model("q4_k_m"), job, here)[1:2]
    without = [replace(way, blocks=tuple(replace(b, making_flops=0.0) for b in way.blocks)) for way in ways]
    making = sum(here.cpu.milliseconds(Work(0, other_flops=b.making_flops, launches=0)) for b in ways[0].blocks)
    for ram, times in ((12 * GB, 1), (22 * GB // 10, 4)):
        took, took_without = (plan_phases([some], here, Budgets(0, ram))[0].total_ms for some in (ways, without))
        assert took - took_without == pytest.approx(times * making, rel=0.05)


@pytest.mark.parametrize(("format_name", "times"), [("int4", 1), ("q4_k_m", 2), ("nf4", 2)])
def test_reencoding_is_traffic(format_name: str, times: int) -> None:
    """Packed bytes in, a byte for each weight out; twice that where much is computed in between."""
    plain, packed = (
        next(block for block in denoise(name).blocks if block.name == "layers.3") for name in ("int8", format_name)
    )
    moved = plain.n_bytes + packed.n_bytes
    more = packed.work.traffic_bytes - plain.work.traffic_bytes
    assert more == pytest.approx(times * moved, rel=0.05)
