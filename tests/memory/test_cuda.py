"""CudaLink, Threads and Streamer on a GPU that is as late as it may be: what it is asked is done when somebody waits
for it, and of two streams in any order that their events allow."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from zimage_lite.memory import hardware
from zimage_lite.memory.cuda import CudaLink
from zimage_lite.memory.plan import DEVICE, FILE, PAGEABLE, PINNED
from zimage_lite.memory.streamer import Places, Route, Streamer
from zimage_lite.memory.workers import Threads

BLOCK_BYTES = 4096
SUCCESS, REFUSED = 0, 2


class LateGpu:
    """Streams are queues of (is it ready?, do it). pinned: start -> bytes."""

    def __init__(self, seed: int, refuse: bool) -> None:
        self.draw, self.refuse, self.lock = random.Random(seed), refuse, threading.RLock()
        self.pinned: dict[int, int] = {}
        self.streams: list[Stream] = []
        self.current = threading.local()
        self.computing = Stream(self)
        self.failures: list[str] = []
        self.most_pinned = 0

    def run(self, until: Callable[[], bool]) -> None:
        with self.lock:
            while not until():
                able = [stream for stream in self.streams if stream.queue and stream.queue[0][0]()]
                assert able, "streams wait for each other"
                self.draw.choice(able).queue.popleft()[1]()

    def idle(self) -> bool:
        return not any(stream.queue for stream in self.streams)

    def check(self, right: bool, what: str) -> None:
        if not right:
            self.failures.append(what)

    def register(self, start: int, n_bytes: int, flags: int) -> int:
        assert start % 4096 == n_bytes % 4096 == 0 and flags == 1
        assert all(start + n_bytes <= other or other + size <= start for other, size in self.pinned.items())
        assert self.current.device == 1, "a context on another GPU"
        time.sleep(0.002)  # as it takes long there: all that did not wait for it has been asked for by then
        if self.refuse:
            return REFUSED
        self.pinned[start] = n_bytes
        self.most_pinned = max(self.most_pinned, len(self.pinned))
        return SUCCESS

    def unregister(self, start: int) -> int:
        self.check(self.idle(), "unpinned while copies may run")
        del self.pinned[start]
        return SUCCESS

    @contextmanager
    def with_stream(self, stream: Stream) -> Iterator[None]:
        self.current.stream = stream
        yield
        del self.current.stream

    @contextmanager
    def with_device(self, device: torch.device) -> Iterator[None]:
        self.current.device = device.index
        yield
        del self.current.device

    def installed(self, monkeypatch: pytest.MonkeyPatch) -> LateGpu:
        cudart = SimpleNamespace(cudaHostRegister=self.register, cudaHostUnregister=self.unregister)
        replaced = {
            "Stream": lambda device: Stream(self),
            "Event": lambda **options: Event(self, **options),
            "current_device": lambda: 1,
            "current_stream": lambda device: self.computing,
            "stream": self.with_stream,
            "device": self.with_device,
            "synchronize": lambda device: self.run(self.idle),
            "cudart": lambda: cudart,
        }
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)
        return self


@dataclass
class Event:
    gpu: LateGpu
    blocking: bool = False
    enable_timing: bool = False
    done: bool | None = None  # None: never recorded, and then nobody waits for it

    def record(self, stream: Stream) -> None:
        assert self.done is None
        self.done = False
        stream.add(lambda: setattr(self, "done", True))

    def synchronize(self) -> None:
        assert self.blocking, "a waiting thread would take the CPU's power"
        self.gpu.run(lambda: self.done is not False)

    def elapsed_time(self, end: Event) -> float:
        assert self.enable_timing and end.enable_timing and self.done and end.done
        return 2.0


@dataclass(eq=False)
class Stream:
    gpu: LateGpu
    queue: deque = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.gpu.streams.append(self)

    def add(self, do: Callable[[], object], ready: Callable[[], bool] = lambda: True) -> None:
        with self.gpu.lock:
            self.queue.append((ready, do))

    def wait_event(self, event: Event) -> None:
        self.add(lambda: None, lambda: event.done is not False)

    def wait_stream(self, other: Stream) -> None:
        event = Event(self.gpu)
        event.record(other)
        self.wait_event(event)

    def query(self) -> bool:
        return not self.queue

    def synchronize(self) -> None:
        self.gpu.run(lambda: not self.queue)


class There:
    """A place on the GPU."""

    def __init__(self, gpu: LateGpu) -> None:
        self.gpu, self.content = gpu, torch.zeros(BLOCK_BYTES, dtype=torch.uint8)

    def __getitem__(self, part: slice) -> There:
        return self

    def copy_(self, source: Tensor, non_blocking: bool) -> None:
        assert non_blocking
        start, gpu = source.data_ptr(), self.gpu
        gpu.check(gpu.refuse or start in gpu.pinned, "asked to copy what is not pinned yet")
        gpu.current.stream.add(lambda: self._take(source))

    def _take(self, source: Tensor) -> None:
        self.gpu.check(self.gpu.refuse or source.data_ptr() in self.gpu.pinned, "copied what is not pinned any more")
        self.content[:] = source


@dataclass
class Model:
    """Eight blocks, of which block i holds nothing but i + 1."""

    gpu: LateGpu
    homes: dict[str, str]
    passes: int = 3

    def __post_init__(self) -> None:
        paged = torch.zeros(BLOCK_BYTES * 16, dtype=torch.uint8)
        start = -paged.data_ptr() % 4096
        cuts = iter(paged[start : start + BLOCK_BYTES * 15].split(BLOCK_BYTES))
        self.places = Places[Any](
            home={name: There(self.gpu) for name, home in self.homes.items() if home == DEVICE},
            held={name: next(cuts) for name, home in self.homes.items() if home in (PINNED, PAGEABLE)},
            slots=[There(self.gpu), There(self.gpu)],
            staging=[next(cuts), next(cuts)],
        )
        self.bound: dict[str, There] = {}
        self.computed: list[str] = []

    def run(self, give_up_after: int | None = None) -> Any:
        places, names = self.places, list(self.homes)
        for place in (*places.slots, *places.home.values()):  # what had the memory before is not done yet
            self.gpu.computing.add(lambda place=place: place.content.fill_(99))
        workers: Any = Threads(dict.fromkeys(names, BLOCK_BYTES), self.jobs, CudaLink(torch.device("cuda")))
        workers.pin([*places.staging, *(places.held[name] for name, home in self.homes.items() if home == PINNED)])
        route = Route(self.homes, 2, 2, self.passes)
        stream: Any = Streamer(route, places, workers, {n: n for n in names}, self.bind, self.bound.pop)
        todo = (block for _ in range(self.passes) for block in stream(names))
        for number, block in enumerate(todo):
            if number == give_up_after:
                break
            place = self.bound[block]
            self.gpu.computing.add(lambda block=block, place=place: self.compute(block, place))
        return workers.close()

    def bind(self, name: str, block: str, place: There) -> None:
        self.bound[block] = place

    def compute(self, block: str, place: There) -> None:
        self.gpu.check(bool((place.content == int(block) + 1).all()), f"block {block} is not there when it runs")
        self.computed.append(block)

    def jobs(self, name: str, into: Tensor) -> Sequence[Callable[[], object]]:
        return [lambda half=half: half.fill_(int(name) + 1) for half in into.split(BLOCK_BYTES // 2)]


HOMES = {
    "all there": (DEVICE,) * 8,
    "pinned": (PINNED,) * 8,
    "pageable": (PAGEABLE,) * 8,
    "files": (FILE,) * 8,
    "mixed": (DEVICE, PINNED, FILE, PAGEABLE, DEVICE, FILE, PINNED, PAGEABLE),
}


@pytest.mark.parametrize("refuse", [False, True], ids=["pinned", "not pinned"])
@pytest.mark.parametrize("homes", HOMES)
def test_every_block_is_there_when_it_runs(homes: str, refuse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(5):
        gpu = LateGpu(seed, refuse).installed(monkeypatch)
        model = Model(gpu, {str(i): home for i, home in enumerate(HOMES[homes])})
        moved = model.run()
        assert not gpu.failures
        assert model.computed == [str(i) for i in range(8)] * 3
        assert gpu.idle() and not gpu.pinned, "something still runs, or stays pinned, after close"
        held = HOMES[homes].count(PINNED)
        assert moved.pinned_bytes == (0 if refuse else (2 + held) * BLOCK_BYTES)
        assert gpu.most_pinned == (0 if refuse else 2 + held)
        streamed = 8 - HOMES[homes].count(DEVICE)
        assert moved.copied_bytes == (8 + 2 * streamed) * BLOCK_BYTES
        assert moved.wait_seconds == pytest.approx(2e-3 * (8 + 2 * streamed))


@pytest.mark.parametrize("blocks", range(0, 24, 3))
def test_giving_up_leaves_nothing_behind(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = LateGpu(blocks, refuse=False).installed(monkeypatch)
    model = Model(gpu, {str(i): home for i, home in enumerate(HOMES["mixed"])})
    model.run(give_up_after=blocks)
    assert not gpu.failures and len(model.computed) == blocks
    assert gpu.idle() and not gpu.pinned
    assert not model.bound.keys() - model.places.home.keys()


@pytest.mark.parametrize("missing", ["wait_event", "wait_stream"])
def test_the_gpu_would_notice(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that forgets an order gives wrong weights here, as it would there."""
    monkeypatch.setattr(Stream, missing, lambda self, other: None)
    failures = []
    for seed in range(5):
        gpu = LateGpu(seed, refuse=False).installed(monkeypatch)
        Model(gpu, {str(i): FILE for i in range(8)}).run()
        failures += gpu.failures
    assert any("is not there when it runs" in failure for failure in failures)


def test_link_speed_is_that_of_the_best_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle link starts slowly; and the first copy alone is a warm-up."""
    times, made = iter([9.0, 4.0, 2.0, 2.5, 3.0]), []

    class Timed:
        def __init__(self, enable_timing: bool) -> None:
            made.append(self)

        def record(self, stream: object) -> None:
            return None

        def elapsed_time(self, end: object) -> float:
            return next(times)

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", Timed)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    device = torch.device("cpu")
    hardware._link_gbps.cache_clear()
    assert hardware._link_gbps(device) == pytest.approx(2**25 / 2.0 / 1e6)
    assert hardware._link_gbps(device) == pytest.approx(2**25 / 2.0 / 1e6) and len(made) == 6
    hardware._link_gbps.cache_clear()
