"""Executes a Route: brings each block where it is computed, in time, and never takes more room than was planned.

It only decides what may be asked for when. The workers do it: threads and a copy stream (`workers.py`), or a virtual
clock in the tests, on which a step takes exactly what `simulate` says. Everything is asked for as early as there is a
place for it, so the copies of the next pass begin while the last blocks of this one compute:

    read    from the file, or from pageable memory, into a staging buffer whose last block has been copied on
    copy    into a slot whose last block has been computed
    wait    compute goes on when the block is there

A device without a link of its own, the CPU, has no staging: blocks are read straight to where they are computed.
It knows names, places and modules, not what they hold or compute.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from .plan import DEVICE, PAGEABLE

Module = TypeVar("Module")
Place = TypeVar("Place")
Event = TypeVar("Event")
_Place = TypeVar("_Place", contravariant=True)


class Workers(Protocol[_Place, Event]):
    """Each call returns at once; what it asks for is done in order, and after the events it names."""

    def read(self, name: str, into: _Place, after: Sequence[Event]) -> Event:
        """A block from its file."""

    def fetch(self, name: str, source: _Place, into: _Place, after: Sequence[Event]) -> Event:
        """A block from pageable memory to a staging buffer."""

    def put_aside(self, name: str, source: _Place, into: _Place, after: Sequence[Event]) -> Event:
        """A block from a staging buffer to pageable memory."""

    def copy(self, name: str, source: _Place, into: _Place, after: Sequence[Event]) -> Event:
        """A block over the link."""

    def mark(self) -> Event:
        """When everything that has been asked to compute so far is done."""

    def wait(self, event: Event) -> None:
        """What is asked to compute from now on comes after the event. Raises what went wrong on the way."""


@dataclass(frozen=True)
class Route:
    """homes: block -> where it waits to be computed (`plan.DEVICE` ...), in the order they run, `passes` times.
    idle: for each pass the blocks that do not run in it; empty: all run in all. turning: every second pass runs
    backwards, as gradients do."""

    homes: Mapping[str, str]
    slots: int
    staging: int = 0
    passes: int = 1
    idle: Sequence[Container[str]] = ()
    turning: bool = False

    def visits(self) -> Iterator[str]:
        """The blocks as they run, in all passes."""
        for number in range(self.passes):
            idle, names = self.idle[number] if self.idle else (), list(self.homes)
            if self.turning and number % 2:
                names.reverse()
            yield from (name for name in names if name not in idle)


@dataclass(frozen=True)
class Places(Generic[Place]):
    """home: of blocks that stay on the device. held: of blocks that wait in RAM, pinned or not."""

    home: Mapping[str, Place]
    held: Mapping[str, Place]
    slots: Sequence[Place]
    staging: Sequence[Place]


@dataclass
class _Passage(Generic[Place, Event]):
    """One block on its way in one pass. slot: None if it stays."""

    name: str
    slot: int | None
    source: Place | None = None
    staging: int | None = None
    events: list[Event] = field(default_factory=list)  # what must have happened before the next thing can


class Streamer(Generic[Module, Place, Event]):
    """Call it with the blocks of a pass, in the route's order, once for each pass; it yields each one ready to run.

    bind(name, module, place) gives a module its weights, unbind(module) takes them away. A pass that is abandoned or
    fails ends the streamer. Raises what a worker raised.
    """

    def __init__(
        self,
        route: Route,
        places: Places[Place],
        workers: Workers[Place, Event],
        names: Mapping[Module, str],
        bind: Callable[[str, Module, Place], None],
        unbind: Callable[[Module], None],
    ) -> None:
        self.route, self.places, self.workers, self.names = route, places, workers, names
        self.bind, self.unbind = bind, unbind
        self._unread = deque(self._passages())
        self._read: deque[_Passage[Place, Event]] = deque()  # asked to be read, not yet to be copied
        self._coming: deque[_Passage[Place, Event]] = deque()  # asked to be copied, not yet computed
        self._slot_free: dict[int, list[Event]] = {slot: [] for slot in range(route.slots)}
        self._staging_free: dict[int, list[Event]] = {buffer: [] for buffer in range(route.staging)}
        self._staged = 0
        self.kept: set[str] = set()  # that lie where they stay
        self._in_place: dict[str, list[Event]] = {}  # of those that wait in RAM: when they lie there

    def __call__(self, blocks: Iterable[Module]) -> Iterator[Module]:
        for block in blocks:
            name = self.names[block]
            if name in self.kept:
                yield block
                continue
            self._ask_ahead()
            passage = self._coming.popleft()
            assert passage.name == name, f"{name} runs where {passage.name} was planned"
            for event in passage.events:
                self.workers.wait(event)
            self.bind(name, block, self._destination(passage))
            if passage.slot is None:
                self.kept.add(name)
                yield block
                continue
            try:
                yield block
            finally:
                self.unbind(block)
            self._slot_free[passage.slot] = [self.workers.mark()]
            self._ask_ahead()

    def end(self) -> None:
        """Let go of all places, so that their memory is free even while somebody still has this streamer."""
        self.places = Places({}, {}, [], [])
        for queue in (self._unread, self._read, self._coming):
            queue.clear()

    def _passages(self) -> Iterator[_Passage[Place, Event]]:
        streamed, staying = 0, set[str]()
        for name in self.route.visits():
            if self.route.homes[name] != DEVICE:
                yield _Passage(name, streamed % self.route.slots)
                streamed += 1
            elif name not in staying:
                yield _Passage(name, None)
                staying.add(name)

    def _ask_ahead(self) -> None:
        while self._ask_read() or self._ask_copy():
            pass

    def _ask_read(self) -> bool:
        """Bring the next block into host memory from which it can be copied, if there is room for it."""
        if not self._unread:
            return False
        passage = self._unread[0]
        name, home = passage.name, self.route.homes[passage.name]
        if self.route.staging:
            held = self.places.held.get(name)
            if held is not None and home != PAGEABLE:
                if name not in self._in_place:
                    self._in_place[name] = passage.events = [self.workers.read(name, held, [])]
                passage.source = held
            elif not self._ask_staged(passage, held):
                return False
        self._read.append(self._unread.popleft())
        return True

    def _ask_staged(self, passage: _Passage[Place, Event], held: Place | None) -> bool:
        """By way of a staging buffer. The first time a block comes from its file, and is put aside on the way if it
        has a place in RAM."""
        buffer = self._staged % self.route.staging
        if buffer not in self._staging_free:
            return False
        after, staging = self._staging_free.pop(buffer), self.places.staging[buffer]
        name, self._staged = passage.name, self._staged + 1
        passage.source, passage.staging = staging, buffer
        if name in self._in_place:
            assert held is not None
            passage.events = [self.workers.fetch(name, held, staging, [*after, *self._in_place[name]])]
            return True
        passage.events = [self.workers.read(name, staging, after)]
        if held is not None:
            self._in_place[name] = [self.workers.put_aside(name, staging, held, passage.events[:1])]
            passage.events += self._in_place[name]
        return True

    def _ask_copy(self) -> bool:
        if not self._read:
            return False
        passage = self._read[0]
        if passage.slot is not None and passage.slot not in self._slot_free:
            return False
        free = self._slot_free.pop(passage.slot) if passage.slot is not None else []
        place, source = self._destination(passage), passage.source
        if source is None:
            passage.events = [self.workers.read(passage.name, place, free)]
        else:
            aside = passage.events[1:]
            copied = self.workers.copy(passage.name, source, place, [*passage.events[:1], *free])
            if passage.staging is not None:
                self._staging_free[passage.staging] = [copied, *aside]
            passage.events = [copied]
        self._coming.append(self._read.popleft())
        return True

    def _destination(self, passage: _Passage[Place, Event]) -> Place:
        return self.places.home[passage.name] if passage.slot is None else self.places.slots[passage.slot]
