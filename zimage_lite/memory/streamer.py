"""Executes a Placement: each block gets its weights just before it runs, and only resident ones keep them.

One block at a time, in the calling thread: correct and simple. It knows names and modules, not what they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from .plan import Placement

Module = TypeVar("Module")


class Streamer(Generic[Module]):
    """Call it with the blocks of one pass; it yields each of them ready to run.

    load(name, module) brings a block's weights in, unload(module) drops them.
    """

    def __init__(
        self,
        plan: Placement,
        names: Mapping[Module, str],
        load: Callable[[str, Module], None],
        unload: Callable[[Module], None],
    ) -> None:
        self.plan, self.names, self.load, self.unload = plan, names, load, unload
        self.loaded: set[str] = set()

    def __call__(self, blocks: Iterable[Module]) -> Iterator[Module]:
        for block in blocks:
            name = self.names[block]
            if name not in self.loaded:
                self.load(name, block)
            if name in self.plan.resident:
                self.loaded.add(name)
                yield block
                continue
            try:
                yield block
            finally:  # also when the pass is abandoned half-way
                self.unload(block)
