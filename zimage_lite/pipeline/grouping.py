"""Sorts what is to be drawn into groups that share a plan, and groups into rounds. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from ..adapters.joined import AdapterSet
from ..config import MOST_PER_ROUND, Lora
from ..memory.plan import Plan
from ..model.samplers import evaluations
from ..plan.job import Job
from .levels import as_tensor
from .tasks import Task
from .words import Segment, all_words, prompts

RELOADING_SHARE = 0.1  # of a round's time, at most, is spent on bringing the transformer's weights in again


@dataclass(frozen=True)
class Group:
    """Images of one size, schedule, sampler, and set of ControlNets; those with the same adapters in a row."""

    tasks: tuple[Task, ...]
    job: Job

    @property
    def loras(self) -> list[tuple[Lora, ...]]:
        """Of each set in `job.adapters`."""
        return list(dict.fromkeys(task.request.loras for task in self.tasks))


def grouped(
    tasks: Sequence[Task], tokens: Mapping[str | Segment, int], adapters: Mapping[tuple[Lora, ...], AdapterSet]
) -> list[Group]:
    """In the order of the first of each. tokens: of what is encoded."""
    found: dict[tuple, dict[tuple[Lora, ...], list[Task]]] = {}
    for task in tasks:
        request, over = task.request, task.sketch is not None
        alike = task.size, task.sigmas, request.sampler, bool(request.guidance), over, task.controls, task.shapes
        found.setdefault(alike, {}).setdefault(request.loras, []).append(task)
    encoded = {prompt for task in tasks for prompt in prompts(task.request)}
    waiting = sum(_pixel_bytes(task.enlarged) for task in tasks if task.enlarged)
    groups = []
    for sets in found.values():
        own, beside = tuple(chain.from_iterable(sets.values())), [adapters[loras] for loras in sets]
        groups.append(Group(own, _job(own, tokens, encoded, beside, waiting)))
    return groups


def _job(
    tasks: Sequence[Task], tokens: Mapping[str | Segment, int], encoded: set[str | Segment],
    adapters: Sequence[AdapterSet], waiting: int,
) -> Job:  # fmt: skip
    """encoded: all whose embeddings wait; waiting: bytes of images that are to be enlarged."""
    first = tasks[0]
    told = dict.fromkeys(words for task in tasks for words in all_words(task.request))
    own = {prompt for words in told for prompt in words.prompts}
    sketches = [task.sketch for task in tasks if task.sketch]
    pictures = {picture.key for task in tasks for picture in task.pictures if picture.latent is None}
    looked_at = {reference.key for task in tasks for reference in task.references}
    sights = {sight.key: sight for task in tasks for sight in task.sights}
    job = Job(
        *first.size,
        first.steps,
        bool(first.request.guidance),
        len(tasks),
        tuple(words.length(tokens) for words in told),
        sum(tokens[prompt] for prompt in encoded - own),
        adapters=tuple(adapters),
        shares=tuple(Counter(task.request.loras for task in tasks).values()),
        evaluations=evaluations(first.request.sampler, first.steps),
        pictures=min(len(pictures), MOST_PER_ROUND * max(len(task.pictures) for task in tasks)),
        over=bool(sketches),
        held_bytes=waiting + _holes_bytes(tasks),
        open_bytes=max((one.source_bytes for task in tasks for one in (*task.pictures, *task.references)), default=0),
        back_bytes=max((sketch.source_bytes for sketch in sketches), default=0),
        controls=first.controls.sizes,
        references=first.shapes,
        looks=min(len(looked_at), MOST_PER_ROUND * len(first.references)),
        contexts=sum(
            sorted(sight.channels for sight in sights.values())[-MOST_PER_ROUND * max(len(first.sights), 1) :]
        ),
    )
    asked = first.controls.asked(first.request.sampler, as_tensor(first.sigmas), len(job.tiles))
    return replace(job, asked=asked) if first.controls else job


def _holes_bytes(tasks: Sequence[Task]) -> int:
    """What pictures with grey holes take more than others: they are float32."""
    kept = {sight.kept.key for task in tasks for sight in task.sights if sight.kept}
    return 3 * _pixel_bytes(tasks[0]) * min(len(kept), MOST_PER_ROUND)


def _pixel_bytes(task: Task) -> int:
    return 3 * task.size[0] * task.size[1]


def rounds(group: Group, denoise: Plan) -> Iterator[Sequence[Task]]:
    """What is denoised before it is decoded. A small round hands its images over early; a large one loads the
    transformer less often."""
    image_ms = denoise.pass_ms * group.job.passes / denoise.way
    wanted = math.ceil(denoise.startup_ms / max(RELOADING_SHARE * image_ms, 1e-9))
    size = -(-min(max(wanted, 1), MOST_PER_ROUND) // denoise.way) * denoise.way
    for start in range(0, len(group.tasks), size):
        yield group.tasks[start : start + size]
