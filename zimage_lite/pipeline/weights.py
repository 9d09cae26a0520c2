"""Joins a skeleton, a checkpoint and a plan: the one place that knows all three.

A component owns its whole budget while it is open and gives everything back when it closes.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeVar

import psutil
import torch
from torch import Tensor, nn
from zimage_kernels import Backend

from ..adapters.joined import NOTHING, AdapterSet, JoinedModule, by_block
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.stored import StoredTensor
from ..memory.cuda import PAGE_BYTES, CudaLink
from ..memory.hardware import Hardware
from ..memory.heap import give_back
from ..memory.meter import rss_bytes
from ..memory.placement import GRANULE_BYTES
from ..memory.plan import DEVICE, FILE, PAGEABLE, PINNED, Plan
from ..memory.streamer import Places, Route, Streamer
from ..memory.workers import HostLink, Job, Moved, Threads
from ..model.linear import Stream, attach, bind, release, shapes
from ..model.side_path import SidePath
from ..model.transformer import is_time_weight
from ..units import round_up
from .reencoding import ReencodedTensor, Scratch, when_read

_Named = TypeVar("_Named")
_Cut = Callable[[int], Tensor]
_Read = StoredTensor | ReencodedTensor | JoinedModule
Reencoded = Literal["when read", "before computing"] | None

_JOB_BYTES = 2**23  # smaller tensors are read by one thread, one after another


@dataclass(frozen=True)
class Component:
    """A model's skeleton and its weights, taken apart: the blocks of the module lists named in `streamed` may come and
    go, the rest stays; what only the time embedding needs is kept out of both. Raises UserError for missing tensors.

    adapters: what is added to the weights, and comes and goes with them.
    """

    model: nn.Module
    checkpoint: Checkpoint
    streamed: tuple[str, ...]
    reencoded: Reencoded = None  # when the blocks' weights become int8, whatever they are stored in
    adapters: AdapterSet = NOTHING
    projecting: Backend | None = None  # what multiplies by their narrow halves; None: as all else

    @cached_property
    def wanted(self) -> Checkpoint:
        return self.checkpoint.restricted_to(shapes(self.model))

    @cached_property
    def blocks(self) -> dict[str, nn.Module]:
        lists = {group: self.model.get_submodule(group) for group in self.streamed}
        return {f"{group}.{name}": block for group, blocks in lists.items() for name, block in blocks.named_children()}

    @cached_property
    def stored(self) -> dict[str, dict[str, StoredTensor]]:
        """The weights of each block, by their names in it."""
        return {
            name: {
                own: tensor for own, tensor in self.wanted.under(name).items() if not is_time_weight(f"{name}.{own}")
            }
            for name in self.blocks
        }

    @cached_property
    def weights(self) -> Mapping[str, Mapping[str, StoredTensor | ReencodedTensor]]:
        """The same as they are once they are read."""
        if self.reencoded != "when read":
            return self.stored
        return {name: when_read(tensors) for name, tensors in self.stored.items()}

    @cached_property
    def rest(self) -> dict[str, StoredTensor]:
        groups = tuple(f"{group}." for group in self.streamed)
        tensors = self.wanted.tensors.items()
        return {name: t for name, t in tensors if not name.startswith(groups) and not is_time_weight(name)}

    @cached_property
    def block_bytes(self) -> dict[str, int]:
        """What each block takes where it is read to."""
        return {name: sum(t.packed_bytes for t in tensors.values()) for name, tensors in self.weights.items()}


class Weights:
    """Brings the blocks of a component to its model as a plan says. Made by `opened`."""

    def __init__(self, component: Component, plan: Plan, hardware: Hardware) -> None:
        self.component, self.plan, self.hardware = component, plan, hardware
        self.moved: list[Moved] = []
        self._there: set[str] = set()  # blocks whose own weights lie where they stay
        # Of blocks that have been read, what is added to them and stays; and of those that are being read.
        self._kept, self._coming = dict[str, _Added](), dict[str, _Added]()
        self._take(component.adapters)
        device, sizes = hardware.device, plan.sizes
        # Apple's GPU has no memory of its own, but the CPU cannot read files into what it works on.
        self._staging = max(plan.staging, int(device.type == "mps"))
        homes = sum(_rounded(sizes[name]) for name in plan.resident)
        prelude = max((_rounded(self._sizes[name]) for name in plan.prelude), default=0)
        self._arena = torch.empty(max(homes + plan.slots * plan.slot_bytes, prelude), dtype=torch.uint8, device=device)
        held = sum(_paged(sizes[name]) for name, home in plan.homes.items() if home in (PINNED, PAGEABLE))
        host = held + self._staging * _paged(plan.staging_bytes)
        self._host = torch.empty(host + PAGE_BYTES * bool(host), dtype=torch.uint8)
        later = component.reencoded == "before computing"
        self._scratch = Scratch(component.stored, device) if later else None

    def change(self, adapters: AdapterSet) -> None:
        """Others from now on. Weights that stay are not read again; only what is added to them is."""
        if adapters is self._adapters or not (adapters or self._adapters):
            return
        release(self.component.model)
        self._take(adapters)
        self.bind_rest()

    def _take(self, adapters: AdapterSet) -> None:
        self._adapters = adapters
        of_blocks, self._added_to_rest = by_block(adapters.modules(self.hardware.dtype).values())
        self._added = {
            name: {joined.module.removeprefix(f"{name}."): joined for joined in of_blocks.get(name, ())}
            for name in self.component.blocks
        }
        self._kept.clear()
        self._sizes = {name: n_bytes + self._added_bytes(name) for name, n_bytes in self.component.block_bytes.items()}

    def _added_bytes(self, name: str) -> int:
        """That come with the block."""
        return 0 if self.plan.keeps else sum(joined.packed_bytes for joined in self._added[name].values())

    @contextmanager
    def prelude(self, passes: int = 1) -> Iterator[Stream]:
        """What runs before the other blocks are there, one block at a time."""
        homes = dict.fromkeys(self.plan.prelude, FILE)
        slot = max((_rounded(self._sizes[name]) for name in homes), default=0)
        with self._streaming(Route(homes, min(len(homes), 1), self._staging, passes), slot) as stream:
            yield stream

    @contextmanager
    def passes(self, count: int, idle: Sequence[Container[str]] = (), turning: bool = False) -> Iterator[Stream]:
        """So many passes over the blocks, as planned. idle: for each pass the blocks that do not run in it; turning:
        every second one runs backwards."""
        route = Route(self.plan.homes, self.plan.slots, self._staging, count, idle, turning)
        with self._streaming(route, self.plan.slot_bytes) as stream:
            yield stream

    @contextmanager
    def _streaming(self, route: Route, slot_bytes: int) -> Iterator[Stream]:
        component, cuda = self.component, self.hardware.device.type == "cuda"
        link = CudaLink(self.hardware.device) if cuda else HostLink()
        names = {block: name for name, block in component.blocks.items()}
        places, sizes = self._places(route, slot_bytes), self._sizes
        self._homes = places.home
        if known := self._there.intersection(route.homes):  # of these, only what is added comes
            ends = {name: place[component.block_bytes[name] :] for name, place in places.home.items() if name in known}
            places = replace(places, home={**places.home, **ends})
            sizes = {**sizes, **{name: self._added_bytes(name) for name in known}}
        workers = Threads(sizes, self._jobs, link)
        stream = Streamer(route, places, workers, names, self._bind, release)
        pinned = [*places.staging, *(places.held[name] for name, home in route.homes.items() if home == PINNED)]
        del places  # else a traceback of this frame would keep the memory
        try:
            workers.pin(pinned)
            pinned.clear()
            steps = self._scratch.through(stream) if self._scratch else stream
            yield self._tidy(steps) if self.hardware.device.type == "cpu" else steps
        finally:
            self.moved.append(workers.close())
            self._there |= stream.kept
            stream.end()
            self._homes = {}

    def _tidy(self, stream: Stream) -> Stream:
        """What blocks leave in the heap goes back before more comes."""

        def tidied(blocks: Iterable[nn.Module]) -> Iterator[nn.Module]:
            for block in stream(blocks):
                yield block
                give_back()

        return tidied

    def _places(self, route: Route, slot_bytes: int) -> Places[Tensor]:
        """Cut from the two buffers: resident blocks, then slots; staging buffers, then what waits in RAM. Where blocks
        are computed with, autograd counts changes of each place apart (as it does of `data`): it would not let a
        gradient through a block if another was copied to the same buffer since."""
        sizes, homes = self.plan.sizes, route.homes  # of the prelude none stays or waits
        arena, host = _cutter(self._arena), _cutter(self._host, -self._host.data_ptr() % PAGE_BYTES)
        return Places(
            home={name: arena(_rounded(sizes[name])).data for name, home in homes.items() if home == DEVICE},
            slots=[arena(slot_bytes).data for _ in range(route.slots)],
            staging=[host(_paged(self.plan.staging_bytes)) for _ in range(route.staging)],
            held={name: host(_paged(sizes[name])) for name, home in homes.items() if home in (PINNED, PAGEABLE)},
        )

    def _jobs(self, name: str, buffer: Tensor) -> Iterator[Job]:
        """Reading a block's tensors, each to its place in the buffer, and then what adapters add."""
        cut, some, n_bytes = _cutter(buffer), list[tuple[_Read, Tensor]](), 0
        stored = () if name in self._there else self.component.weights[name].values()
        own: list[tuple[_Read, Tensor]] = [(tensor, cut(tensor.packed_bytes)) for tensor in stored]
        for tensor, place in (*own, *self._added_places(name, cut)):
            some.append((tensor, place))
            n_bytes += tensor.packed_bytes
            if n_bytes >= _JOB_BYTES:
                yield self._reading(some, name)
                some, n_bytes = [], 0
        if some:
            yield self._reading(some, name)

    def _added_places(self, name: str, cut: _Cut) -> Iterable[tuple[JoinedModule, Tensor]]:
        """What is still to be made of what is added to a block, and where to."""
        if not self.plan.keeps:
            return [(joined, cut(joined.packed_bytes)) for joined in self._added[name].values()]
        if name in self._kept:
            return ()
        added = self._added[name].items()
        places = {own: (joined, torch.empty(joined.packed_bytes, dtype=torch.uint8)) for own, joined in added}
        self._coming[name] = _Added(places, self.component.projecting)
        return places.values()

    def _reading(self, some: list[tuple[_Read, Tensor]], name: str) -> Job:
        def read() -> None:
            for tensor, place in some:
                tensor.read_to(place)
                if not isinstance(tensor, JoinedModule) and self._passes_by and self.plan.homes.get(name) == FILE:
                    tensor.forget()

        return read

    @cached_property
    def _passes_by(self) -> bool:
        """Whether what comes from the file in every pass is more than the system could keep in its page cache: then
        keeping some of it only pushes other programs out."""
        spare = psutil.virtual_memory().available - max(self.plan.peak_ram_bytes - rss_bytes(), 0)
        return self.plan.disk_bytes > spare

    def _bind(self, name: str, block: nn.Module, place: Tensor) -> None:
        cut = _cutter(self._homes.get(name, place))
        packed = {own: t.packed_in(cut(t.packed_bytes)) for own, t in self.component.weights[name].items()}
        bind(block, packed, self.hardware.dtype)
        if not self.plan.keeps:
            added = {own: (joined, cut(joined.packed_bytes)) for own, joined in self._added[name].items()}
            _Added(added, self.component.projecting).attach(block)
            return
        if name in self._coming:
            self._kept[name] = self._coming.pop(name)
        self._kept[name].attach(block)

    def bind_rest(self) -> None:
        """What belongs to no block."""
        model = self.component.model
        read_into(model, self.component.rest, self.hardware)
        _attach_read(model, {joined.module: joined for joined in self._added_to_rest}, self.hardware)


@contextmanager
def opened(component: Component, plan: Plan, hardware: Hardware) -> Iterator[Weights]:
    """Bind what stays; blocks come with `prelude` and `passes`. hardware: to compute on, as the plan says."""
    weights = Weights(component, plan, hardware)
    try:
        weights.bind_rest()
        yield weights
    finally:
        release(component.model)
        del weights._arena, weights._host
        weights._kept.clear()
        if weights._scratch:
            weights._scratch.end()
        give_back(0)
        if hardware.device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def time_weights(component: Component, hardware: Hardware) -> Iterator[Stream]:
    """For `Transformer.modulations`: its weights, on the CPU and in float32, one block's at a time."""
    there, names = hardware.on_cpu(), {block: name for name, block in component.blocks.items()}
    own = {name: tensor for name, tensor in component.wanted.tensors.items() if is_time_weight(name)}
    added = {name: joined for name, joined in component.adapters.modules(there.dtype).items() if is_time_weight(name)}

    def stream(blocks: Iterable[nn.Module]) -> Iterator[nn.Module]:
        for block in blocks:
            prefix = f"{names[block]}."
            read_into(block, _under(prefix, own), there)
            _attach_read(block, _under(prefix, added), there)
            yield block
            release(block)

    groups = tuple(f"{group}." for group in component.streamed)
    try:
        read_into(component.model, _outside(groups, own), there)
        _attach_read(component.model, _outside(groups, added), there)
        yield stream
    finally:
        release(component.model)


def read_into(module: nn.Module, tensors: Mapping[str, StoredTensor], hardware: Hardware) -> None:
    """Read the tensors from their files and bind them to the module on the device."""
    for name, stored in tensors.items():  # one by one: of those that are unpacked, the packed bytes go at once
        bind(module, {name: stored.read().to(hardware.device)}, hardware.dtype)


def _attach_read(module: nn.Module, joined: Mapping[str, JoinedModule], hardware: Hardware) -> None:
    """Read what adapters add, and attach it to the module on the device."""
    _Added({name: (one, one.made().to(hardware.device)) for name, one in joined.items()}).attach(module)


class _Added:
    """What adapters add to a block, where it lies. A side path turns its own numbers to what it multiplies by, so there
    is one for as long as they lie there."""

    def __init__(self, places: Mapping[str, tuple[JoinedModule, Tensor]], projecting: Backend | None = None) -> None:
        self.places, self.projecting = places, projecting

    def attach(self, block: nn.Module) -> None:
        """Once it is read."""
        attach(block, *self._made)

    @cached_property
    def _made(self) -> tuple[dict[str, SidePath], dict[str, Tensor]]:
        linears = {name: pair for name, pair in self.places.items() if pair[0].is_linear}
        sides = {name: joined.side_in(place, self.projecting) for name, (joined, place) in linears.items()}
        others = {name: joined.delta_in(place) for name, (joined, place) in self.places.items() if name not in linears}
        return sides, others


def _under(prefix: str, named: Mapping[str, _Named]) -> dict[str, _Named]:
    """Those whose names begin so, without that."""
    return {name.removeprefix(prefix): one for name, one in named.items() if name.startswith(prefix)}


def _outside(groups: tuple[str, ...], named: Mapping[str, _Named]) -> dict[str, _Named]:
    return {name: one for name, one in named.items() if not name.startswith(groups)}


def _rounded(n_bytes: int) -> int:
    """As the planner counts places on the device."""
    return round_up(n_bytes, GRANULE_BYTES)


def _paged(n_bytes: int) -> int:
    """Of host memory, which is pinned in whole pages."""
    return round_up(n_bytes, PAGE_BYTES)


def _cutter(buffer: Tensor, start: int = 0) -> _Cut:
    """Gives the next so many bytes of the buffer."""

    def cut(n_bytes: int) -> Tensor:
        nonlocal start
        first, start = start, start + n_bytes
        assert start <= len(buffer), "more was taken than was planned"
        return buffer[first:start]

    return cut
