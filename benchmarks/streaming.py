"""Runs the streamer on real threads beside a device of which only the time is real, at many residencies.

    python benchmarks/streaming.py --out benchmarks/results/streaming_threads.json

The device has a queue to compute and one to copy, as a GPU has, and what is put into them takes exactly as long as it
is told, in real time; a disk, likewise, is a queue that reading threads wait for. Streamer, threads, futures and
copies in RAM are real. A step is the 32 blocks of the true model, 20 ms each. The bar of every case:

    mean step <= 1.05 x max(compute, link, disk) + one block

Exits with 1 if a case misses it. The last line is the JSON that also goes to --out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from full_size import machine
from torch import Tensor

from zimage_lite.bench.machine import commit
from zimage_lite.memory.placement import SLOT_COUNTS, spread
from zimage_lite.memory.plan import DEVICE, FILE, PAGEABLE, PINNED
from zimage_lite.memory.simulate import Passage, Run, simulate
from zimage_lite.memory.streamer import Places, Route, Streamer
from zimage_lite.memory.workers import HostLink, Job, Threads

BLOCKS, PASSES = 32, 4
COMPUTE_MS = 20.0
LINKS_MS = (10.0, 20.0, 30.0)  # a block's copy: faster than its compute, as fast, slower
READ_MS = 15.0  # a block from the disk
BLOCK_BYTES = 2**23  # what is really copied from pageable memory to a staging buffer
STAGING = 2
SLACK, EXTRA_BLOCKS = 1.05, 1
IDLE_PASSES = 30  # to measure what a passage costs beside what it moves and computes


class Queue:
    """Does one thing after another, each as long as it is told. A moment is a time of `perf_counter`."""

    def __init__(self) -> None:
        self.end, self._lock = 0.0, threading.Lock()

    def add(self, ms: float, after: Sequence[float] = ()) -> float:
        """-> when it will be done."""
        with self._lock:
            self.end = max([time.perf_counter(), self.end, *after]) + ms / 1000
            return self.end


def sleep_until(moment: float) -> None:
    while (left := moment - time.perf_counter()) > 0:
        time.sleep(left)


class Device(HostLink):
    """The link to a device with two queues. Who asks for something does not wait for it, as on a GPU."""

    def __init__(self, copy_ms: float) -> None:
        self.copy_ms, self.computing, self.copying = copy_ms, Queue(), Queue()

    def copy(self, source: Tensor, into: Tensor, after: Sequence[float]) -> float:  # type: ignore[override]
        return self.copying.add(self.copy_ms, after)

    def compute(self, ms: float) -> None:
        self.computing.add(ms)

    def mark(self) -> float:  # type: ignore[override]
        return self.computing.end

    def hold(self, moment: float, paused: None) -> None:  # type: ignore[override]
        self.computing.add(0.0, [moment])

    def block(self, moment: float) -> None:  # type: ignore[override]
        sleep_until(moment)

    def synchronize(self) -> None:
        sleep_until(self.computing.end)


class Processor(HostLink):
    """Computes in the calling thread."""

    def compute(self, ms: float) -> None:
        sleep_until(time.perf_counter() + ms / 1000)

    def synchronize(self) -> None:
        return None


@dataclass(frozen=True)
class Times:
    """Of one block, in ms. jobs: in so many pieces it is read."""

    compute_ms: float
    copy_ms: float
    read_ms: float
    fetch_ms: float
    jobs: int = 8


@dataclass(frozen=True)
class Case:
    """home: of the blocks that do not stay; for the CPU, which has no link, they come from the file."""

    device: str  # "gpu" or "cpu"
    home: str
    kept: int
    times: Times

    def passages(self) -> list[Passage]:
        resident, times = set(spread(BLOCKS, self.kept)), self.times
        if self.device == "cpu":
            return [Passage(f"b{i}", times.compute_ms, times.read_ms, stays=i in resident) for i in range(BLOCKS)]
        again = {FILE: times.read_ms, PAGEABLE: times.fetch_ms, PINNED: 0.0}[self.home]
        return [
            Passage(f"b{i}", times.compute_ms, times.copy_ms, again, times.read_ms, i in resident)
            for i in range(BLOCKS)
        ]

    @property
    def staging(self) -> int:
        return STAGING if self.device == "gpu" else 0

    def slots(self) -> int:
        """As the planner chooses: of the fastest, the first it tries."""
        counts = [count for count in SLOT_COUNTS if count <= BLOCKS - self.kept]
        return min(counts, key=lambda count: self.simulated(count).total_ms, default=0)

    def simulated(self, slots: int, passes: int = PASSES) -> Run:
        return simulate(self.passages(), slots, self.staging, passes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--all", action="store_true", help="every residency from 0 to 32, else every fourth")
    args = parser.parse_args()
    fetch_ms = measured_fetch_ms()
    idle = {f"{device} {home}": idle_microseconds(device, home) for device, home in
            (("gpu", PINNED), ("gpu", PAGEABLE), ("gpu", FILE), ("cpu", FILE))}  # fmt: skip
    print(f"a passage without bytes and compute, us: {idle}")
    print("device home      copy ms  kept  slots  simulated  measured  worst   bar ms  per block, over simulated")
    rows = []
    for case in cases(range(0, BLOCKS + 1, 1 if args.all else 4), fetch_ms):
        rows.append(row := measured(case))
        times = f"{row['simulated_ms']:10.1f} {row['step_ms']:9.1f} {row['worst_step_ms']:6.1f} {row['bar_ms']:8.1f}"
        over = f"{row['over_us_per_block']:8} us{'' if row['kept_bar'] else '  MISSED'}"
        case_told = f"{case.device:6} {case.home:8} {row['link_ms']:8} {case.kept:5} {row['slots']:6}"
        print(case_told, times, over, flush=True)
    missed = sum(not row["kept_bar"] for row in rows)
    report = {
        "machine": machine(), "commit": commit(), "block_ms": COMPUTE_MS, "blocks": BLOCKS, "passes": PASSES,
        "fetch_ms": fetch_ms, "idle_us_per_passage": idle, "missed": missed,
        "mean_over_us_per_block": round(sum(row["over_us_per_block"] for row in rows) / len(rows)), "rows": rows,
    }  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    sys.exit(bool(missed))


def cases(residencies: Sequence[int], fetch_ms: float) -> Iterator[Case]:
    for kept in residencies:
        for copy_ms in LINKS_MS:
            for home in (PINNED, PAGEABLE, FILE):
                yield Case("gpu", home, kept, Times(COMPUTE_MS, copy_ms, READ_MS, fetch_ms))
            yield Case("cpu", FILE, kept, Times(COMPUTE_MS, 0.0, copy_ms, 0.0))


def measured(case: Case) -> dict[str, Any]:
    slots, times = case.slots(), case.times
    ends = run(case, slots, PASSES)
    steps = [1000 * (end - start) for start, end in itertools.pairwise(ends)]
    step, moving = sum(steps) / len(steps), BLOCKS - case.kept
    again = {FILE: times.read_ms, PAGEABLE: times.fetch_ms, PINNED: 0.0}[case.home]
    longest = max(BLOCKS * times.compute_ms, moving * times.copy_ms, moving * again)
    bar = SLACK * longest + EXTRA_BLOCKS * times.compute_ms
    simulated = case.simulated(slots).pass_ms
    return {
        "device": case.device, "home": case.home, "kept": case.kept, "slots": slots,
        "link_ms": times.copy_ms if case.device == "gpu" else times.read_ms, "times": asdict(times),
        "simulated_ms": round(simulated, 1), "step_ms": round(step, 1), "worst_step_ms": round(max(steps), 1),
        "longest_ms": round(longest, 1), "bar_ms": round(bar, 1), "kept_bar": step <= bar,
        "over_us_per_block": round(1000 * (step - simulated) / BLOCKS),
    }  # fmt: skip


def run(case: Case, slots: int, passes: int) -> list[float]:
    """-> when each pass was done, by the clock."""
    times, disk = case.times, Queue()
    names = [f"b{i}" for i in range(BLOCKS)]
    resident = set(spread(BLOCKS, case.kept))
    homes = {name: DEVICE if i in resident else case.home for i, name in enumerate(names)}
    device = Device(times.copy_ms) if case.device == "gpu" else Processor()

    def jobs(name: str, into: Tensor) -> Iterator[Job]:
        return iter([lambda: sleep_until(disk.add(times.read_ms / times.jobs))] * times.jobs)

    n_bytes = BLOCK_BYTES if times.fetch_ms else 1
    workers = Threads(dict.fromkeys(names, n_bytes), jobs, device)
    places = Places(
        home=dict.fromkeys((name for name, home in homes.items() if home == DEVICE), _buffer(1)),
        held={name: _buffer(n_bytes) for name, home in homes.items() if home in (PINNED, PAGEABLE)},
        slots=[_buffer(1)] * slots,
        staging=[_buffer(n_bytes) for _ in range(case.staging)],
    )
    route = Route(homes, slots, case.staging, passes)
    stream = Streamer(route, places, workers, {name: name for name in names}, _bind, _unbind)
    ends = []
    try:
        for _ in range(passes):
            for _ in stream(names):
                device.compute(times.compute_ms)
            device.synchronize()  # as the pipeline does, which looks at every step's latent
            ends.append(time.perf_counter())
    finally:
        workers.close()
    return ends


def idle_microseconds(device: str, home: str) -> int:
    """Of the computing thread and those that it waits for, per block, where nothing takes any time."""
    ends = run(Case(device, home, 0, Times(0.0, 0.0, 0.0, 0.0)), 2, IDLE_PASSES)
    return round(1e6 * (ends[-1] - ends[0]) / (IDLE_PASSES - 1) / BLOCKS)


def measured_fetch_ms() -> float:
    """Of a block, from pageable memory to a staging buffer."""
    source, into = _buffer(4 * BLOCK_BYTES), _buffer(BLOCK_BYTES)
    start = time.perf_counter()
    for i in range(40):
        into.copy_(source[i % 4 * BLOCK_BYTES :][:BLOCK_BYTES])
    return round(1000 * (time.perf_counter() - start) / 40, 2)


def _buffer(n_bytes: int) -> Tensor:
    return torch.zeros(n_bytes, dtype=torch.uint8)


def _bind(name: str, block: str, place: Tensor) -> None:
    return None


def _unbind(block: str) -> None:
    return None


if __name__ == "__main__":
    main()
