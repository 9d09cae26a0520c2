"""The streamer on a virtual clock: it does what was planned, in the time that was simulated, in the room there is."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from zimage_lite.memory.placement import nested_order, spread
from zimage_lite.memory.plan import DEVICE, FILE, PAGEABLE, PINNED
from zimage_lite.memory.simulate import Passage, Run, simulate
from zimage_lite.memory.streamer import Places, Route, Streamer


class Clock:
    """Workers that take the times of `passages`, in milliseconds, and check that no place is overwritten too early.

    contents: place -> the block that it holds. Places are their own names.
    """

    def __init__(self, passages: Sequence[Passage], staged: bool) -> None:
        self.times, self.staged = {passage.name: passage for passage in passages}, staged
        self.now = self.reader = self.link = 0.0
        self.contents: dict[str, str] = {}
        self.aside: dict[str, float] = {}  # block -> the event of its being put aside, itself
        self.was_read: set[str] = set()
        self.waited_ms = 0.0

    def read(self, name: str, into: str, after: Sequence[float]) -> float:
        times = self.times[name]
        if not self.staged:  # straight to where it is computed: the file is the link
            return self._linked(times.copy_ms, name, into, after)
        self.contents[into] = name
        duration = times.read_ms if name in self.was_read else times.first_read_ms
        self.was_read.add(name)
        self.reader = max([self.reader, *after]) + duration
        return self.reader

    def fetch(self, name: str, source: str, into: str, after: Sequence[float]) -> float:
        assert self.contents[source] == name
        assert any(event is self.aside[name] for event in after), "by another thread than the one that puts it there"
        self.contents[into] = name
        self.reader = max([self.reader, *after]) + self.times[name].read_ms
        return self.reader

    def put_aside(self, name: str, source: str, into: str, after: Sequence[float]) -> float:
        assert self.contents[source] == name
        self.contents[into] = name
        self.aside[name] = max(after) + 0.0
        return self.aside[name]

    def copy(self, name: str, source: str, into: str, after: Sequence[float]) -> float:
        assert self.contents[source] == name
        return self._linked(self.times[name].copy_ms, name, into, after)

    def _linked(self, duration: float, name: str, into: str, after: Sequence[float]) -> float:
        self.contents[into] = name
        self.link = max([self.link, *after]) + duration
        return self.link

    def mark(self) -> float:
        return self.now

    def wait(self, event: float) -> None:
        self.waited_ms += max(event - self.now, 0.0)
        self.now = max(self.now, event)

    def compute(self, name: str) -> None:
        self.now += self.times[name].compute_ms


class Model:
    """Blocks are their own names. bound: block -> place."""

    def __init__(self, route: Route, passages: Sequence[Passage]) -> None:
        self.route, self.clock = route, Clock(passages, staged=route.staging > 0)
        self.bound: dict[str, str] = {}
        self.most_bound = 0
        places = Places(
            home={name: f"home of {name}" for name, home in route.homes.items() if home == DEVICE},
            held={name: f"RAM of {name}" for name, home in route.homes.items() if home in (PINNED, PAGEABLE)},
            slots=[f"slot {i}" for i in range(route.slots)],
            staging=[f"staging {i}" for i in range(route.staging)],
        )
        names = {name: name for name in route.homes}
        self.stream = Streamer(route, places, self.clock, names, self.bind, self.unbind)

    def bind(self, name: str, block: str, place: str) -> None:
        assert name == block and self.clock.contents[place] == name
        assert place not in self.bound.values()
        self.bound[block] = place
        self.most_bound = max(self.most_bound, len(self.bound))

    def unbind(self, block: str) -> None:
        del self.bound[block]

    def run(self) -> Run:
        ends = []
        for number in range(self.route.passes):
            idle = self.route.idle[number] if self.route.idle else ()
            for block in self.stream(name for name in self.route.homes if name not in idle):
                assert self.clock.contents[self.bound[block]] == block, "overwritten while it was needed"
                self.clock.compute(block)
            ends.append(self.clock.now)
        return Run(tuple(ends))


def passages_of(route: Route, times: Sequence[tuple[float, float, float, float]]) -> list[Passage]:
    """times: compute, copy, first read, read again if it is not held where copies can start."""
    found = []
    for (name, home), (compute, copy, first, again) in zip(route.homes.items(), times, strict=True):
        gpu = route.staging > 0
        later = again if gpu and home in (FILE, PAGEABLE) else 0.0
        found.append(Passage(name, compute, copy, later, first if gpu else 0.0, home == DEVICE))
    return found


def routes() -> Iterator[Route]:
    """All residencies of 7 blocks, homes of the others mixed, slots and staging buffers of all counts."""
    names = [f"b{i}" for i in range(7)]
    for kept, slots, staging in itertools.product(range(8), (1, 2, 3), (0, 1, 2)):
        resident = {names[i] for i in spread(7, kept)}
        rest = [name for name in names if name not in resident]
        for kinds in ((FILE,), (PINNED,), (PAGEABLE,), (PINNED, FILE), (PINNED, PAGEABLE, FILE)):
            if staging or kinds == (FILE,):
                homes = dict.fromkeys(names, DEVICE)
                homes |= {rest[i]: kinds[n % len(kinds)] for n, i in enumerate(nested_order(len(rest)))}
                yield Route(homes, slots if rest else 0, staging, passes=4)


@pytest.mark.parametrize("seed", range(6))
def test_it_takes_what_was_simulated(seed: int) -> None:
    """To the last digit: whatever the plan says of time holds for what is executed."""
    draw = random.Random(seed)
    for route in routes():
        times = [tuple(draw.choice((0.5, 3.0, 8.0, 20.0)) for _ in range(4)) for _ in route.homes]
        passages = passages_of(route, times)
        assert Model(route, passages).run().ends_ms == simulate(passages, route.slots, route.staging, 4).ends_ms
        idle = [frozenset(draw.sample(list(route.homes), draw.choice((0, 2, 7)))) for _ in range(4)]
        some = simulate(passages, route.slots, route.staging, 4, idle=idle)
        assert Model(replace(route, idle=idle), passages).run().ends_ms == some.ends_ms


@pytest.mark.parametrize("copy_ms", [2.0, 15.0, 20.0, 25.0, 80.0])
@pytest.mark.parametrize("staging", [0, 2])
def test_a_step_is_as_long_as_its_longer_half(staging: int, copy_ms: float) -> None:
    """The 32 blocks of a step, 20 ms each: at most 1.05 x max(compute, copy) and one block, however many stay.

    With three slots; with two, copies that take a little longer than blocks stall behind those that stay (1.06 x)."""
    for kept in range(33):
        resident = spread(32, kept)
        homes = {f"b{i}": DEVICE if i in resident else (PINNED if staging else FILE) for i in range(32)}
        route = Route(homes, slots=min(3, 32 - kept), staging=staging, passes=6)
        passages = passages_of(route, [(20.0, copy_ms, 40.0, 0.0)] * 32)
        ends = Model(route, passages).run().ends_ms
        longer = max(32 * 20.0, (32 - kept) * copy_ms)
        for start, end in itertools.pairwise(ends):
            assert end - start <= 1.05 * longer + 20.0


def noted(calls: list[str], kind: str, call: Callable[..., float]) -> Callable[..., float]:
    def noting(name: str, *rest: Any) -> float:
        calls.append(f"{kind} {name}")
        return call(name, *rest)

    return noting


def test_nothing_is_sent_again() -> None:
    """What stays is copied once, what is held in RAM is read once, and the next pass is on its way before it begins."""
    homes = {"a": DEVICE, "b": PINNED, "c": FILE, "d": PAGEABLE}
    model = Model(Route(homes, slots=2, staging=2, passes=3), passages_of(Route(homes, 2, 2, 3), [(9, 1, 1, 1)] * 4))
    calls: list[str] = []
    for kind in ("read", "fetch", "put_aside", "copy"):
        setattr(model.clock, kind, noted(calls, kind, getattr(model.clock, kind)))
    model.run()
    counts = {call: calls.count(call) for call in calls}
    assert counts == {
        "read a": 1, "copy a": 1, "read b": 1, "copy b": 3, "read c": 3, "copy c": 3, "read d": 1, "put_aside d": 1,
        "fetch d": 2, "copy d": 3,
    }  # fmt: skip
    assert model.bound == {"a": "home of a"} and model.most_bound == 2


def test_blocks_that_are_idle_are_not_sent() -> None:
    """Nor asked for early: what stays is sent for the first pass that it runs in."""
    homes = {"a": DEVICE, "b": FILE, "c": DEVICE, "d": FILE}
    idle = [{"c", "d"}, set[str](), {"c", "d"}]
    route = Route(homes, slots=1, staging=1, passes=3, idle=idle)
    model, calls, visited = Model(route, passages_of(route, [(1, 1, 1, 1)] * 4)), list[str](), list[str]()
    model.clock.copy = noted(calls, "copy", model.clock.copy)  # type: ignore[method-assign]
    for some in idle:
        for block in model.stream(name for name in homes if name not in some):
            assert model.clock.contents[model.bound[block]] == block
            visited.append(block)
    assert visited == ["a", "b", "a", "b", "c", "d", "a", "b"] == list(route.visits())
    assert calls == ["copy a", "copy b", "copy b", "copy c", "copy d", "copy b"]


def test_a_way_back_is_brought_backwards() -> None:
    """Whatever stays, through however many slots: no block is overwritten before it was needed for the last time."""
    for route in routes():
        turning = replace(route, passes=4, turning=True, idle=[(), {"b0", "b1"}] * 2)
        model, visited = Model(turning, passages_of(route, [(5, 3, 4, 2)] * 7)), list[str]()
        for some in (list(route.homes), list(route.homes)[:1:-1]) * 2:
            for block in model.stream(some):
                assert model.clock.contents[model.bound[block]] == block, "overwritten while it was needed"
                model.clock.compute(block)
                visited.append(block)
        assert visited == list(turning.visits()) and len(visited) == 2 * (7 + 5)


def test_a_pass_that_fails_leaves_no_passing_block_bound() -> None:
    homes = {"a": DEVICE, "b": FILE, "c": FILE}
    model = Model(Route(homes, slots=2, staging=0, passes=2), passages_of(Route(homes, 2), [(1, 1, 1, 1)] * 3))
    started = model.stream(homes)
    assert [next(started), next(started)] == ["a", "b"] and set(model.bound) == {"a", "b"}
    started.close()
    assert set(model.bound) == {"a"}


def test_blocks_come_in_the_order_of_the_route() -> None:
    homes = {"a": FILE, "b": FILE}
    model = Model(Route(homes, slots=1), passages_of(Route(homes, 1), [(1, 1, 1, 1)] * 2))
    with pytest.raises(AssertionError, match="b runs where a was planned"):
        next(model.stream(["b"]))
