"""Sorts what is to be drawn into groups that share a plan, and groups into rounds. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..adapters.joined import AdapterSet
from ..config import MOST_PER_ROUND, GenerateOptions, Lora
from ..memory.plan import Plan
from ..plan.job import Job

RELOADING_SHARE = 0.1  # of a round's time, at most, is spent on bringing the transformer's weights in again


@dataclass(frozen=True)
class Group:
    """Images of one size, schedule and set of adapters. indices: their places in what was asked for."""

    indices: tuple[int, ...]
    requests: tuple[GenerateOptions, ...]
    job: Job


def grouped(
    requests: Sequence[GenerateOptions],
    texts: Sequence[Sequence[str]],
    tokens: Mapping[str, int],
    adapters: Mapping[tuple[Lora, ...], AdapterSet],
) -> list[Group]:
    """In the order of the first of each. texts: what each request needs encoded; tokens: text -> its tokens."""
    found: dict[tuple, list[int]] = {}
    for index, request in enumerate(requests):
        alike = request.size, request.step_count, bool(request.guidance), request.shift, request.loras
        found.setdefault(alike, []).append(index)
    groups, all_tokens = [], sum(tokens[text] for text in {text for own in texts for text in own})
    for ((width, height), steps, guided, _, loras), indices in found.items():
        own = dict.fromkeys(text for index in indices for text in texts[index])
        own_tokens = tuple(tokens[text] for text in own)
        job = Job(width, height, steps, guided, len(indices), own_tokens, all_tokens - sum(own_tokens), adapters[loras])
        groups.append(Group(tuple(indices), tuple(requests[index] for index in indices), job))
    return groups


def rounds(group: Group, denoise: Plan) -> Iterator[range]:
    """Places in the group that are denoised before they are decoded. A small round hands its images over early; a
    large one loads the transformer less often."""
    image_ms = denoise.pass_ms * group.job.steps / denoise.way
    wanted = math.ceil(denoise.startup_ms / max(RELOADING_SHARE * image_ms, 1e-9))
    size = -(-min(max(wanted, 1), MOST_PER_ROUND) // denoise.way) * denoise.way
    for start in range(0, len(group.requests), size):
        yield range(start, min(start + size, len(group.requests)))
