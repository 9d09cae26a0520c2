"""What ControlNets take beside the transformer, for the planner."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from ..convert.catalog import Part
from ..model.controlnet import CONTROLS
from .job import ControlSizes, Job

_WAITING = 2  # the state of each and its hint, both like the residual stream


def beside(controls: Sequence[ControlSizes]) -> Iterator[Part]:
    """Their tensors, by their names beside the transformer's."""
    for i, control in enumerate(controls):
        yield from (replace(part, name=f"{CONTROLS}.{i}.{part.name}") for part in control.parts)


def idle(job: Job, blocks: Iterable[str], batches: int) -> tuple[frozenset[str], ...]:
    """Of each pass over so many batches, which blocks of ControlNets do not run in it; empty if all always do."""
    if all(job.asked):
        return ()
    own = frozenset(name for name in blocks if name.startswith(f"{CONTROLS}."))
    return tuple(frozenset[str]() if asked else own for asked in job.asked) * batches


def control_bytes(job: Job, batch: int, stream_bytes: int, item_bytes: int) -> dict[str, int]:
    """Beside the activations of a block. stream_bytes: of the residual stream of so many images."""
    if not job.controls:
        return {}
    waiting = _WAITING * len(job.controls) + sum(control.copies for control in job.controls)
    channels = sum(control.config.control_in_dim for control in job.controls)
    return {
        "control states": waiting * stream_bytes,
        "what controls see": item_bytes * batch * channels * job.latents,
    }
