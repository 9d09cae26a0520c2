"""What a set of adapters adds to a job, for the planner."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ..memory.hardware import DTYPES
from ..model.transformer import is_time_weight
from .joined import AdapterSet, by_block


@dataclass(frozen=True)
class Load:
    """bytes, flops (for each token): of each block; rest: bytes outside of the blocks; time: of what serves the time
    embedding alone; making: bytes that computing the largest one takes for a moment; columns: of the inputs that are
    read once more, of each block."""

    bytes: Mapping[str, int] = field(default_factory=dict)
    flops: Mapping[str, int] = field(default_factory=dict)
    columns: Mapping[str, int] = field(default_factory=dict)
    rest: int = 0
    time: int = 0
    making: int = 0


def most_of(sets: Iterable[AdapterSet], dtype: str) -> Load:
    """What there must be room for where one follows another."""
    loads = [load_of(adapters, dtype) for adapters in sets if adapters]
    return Load(
        bytes=_most(load.bytes for load in loads),
        flops=_most(load.flops for load in loads),
        columns=_most(load.columns for load in loads),
        rest=max((load.rest for load in loads), default=0),
        time=max((load.time for load in loads), default=0),
        making=max((load.making for load in loads), default=0),
    )


def _most(of_blocks: Iterable[Mapping[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for own in of_blocks:
        for name, value in own.items():
            found[name] = max(value, found.get(name, 0))
    return found


def load_of(adapters: AdapterSet, dtype: str) -> Load:
    """dtype: to compute in."""
    if not adapters:
        return Load()
    modules = adapters.modules(DTYPES[dtype]).values()
    blocks, rest = by_block(modules)
    time = [joined for joined in adapters.modules(torch.float32).values() if is_time_weight(joined.module)]
    return Load(
        bytes={name: sum(joined.packed_bytes for joined in own) for name, own in blocks.items()},
        flops={name: sum(joined.flops for joined in own) for name, own in blocks.items()},
        columns={name: sum(joined.applied[0][0].target.columns for joined in own) for name, own in blocks.items()},
        rest=sum(joined.packed_bytes for joined in rest),
        time=sum(joined.packed_bytes for joined in time),
        making=max((joined.reading_bytes for joined in modules), default=0),
    )
