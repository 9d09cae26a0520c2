"""What is asked for, as images to draw: sizes, noise levels, and the pictures that they are made from."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace

from ..config import SIZE_MULTIPLE, GenerateOptions
from .levels import levels_of
from .sketch import Sketch, sketch_of
from .walk import Image, Source


@dataclass(frozen=True)
class Task:
    """One image to be drawn. place: among those that were asked for; request: complete; size: width and height that
    the model draws; sigmas: from the first noise level to 0; sketch: what it is made from; enlarged: what is made from
    it in turn."""

    place: int
    request: GenerateOptions
    size: tuple[int, int]
    sigmas: tuple[float, ...]
    sketch: Sketch | None = None
    enlarged: Task | None = None

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def begun(self, sources: Mapping[Hashable, Source]) -> Image:
        """sources: what sketches have become, by their keys."""
        source = sources[self.sketch.key] if self.sketch else None
        return Image(self.place, self.request, self.size, source)


def tasks_of(requests: Iterable[GenerateOptions], channels: int, default_size: tuple[int, int]) -> list[Task]:
    """requests: complete. channels: of latents. Those that enlarge another come after all others. Raises UserError."""
    known: dict[Hashable, Sketch] = {}
    firsts = [
        _task(place, request, sketch_of(request, channels, default_size, known))
        for place, request in enumerate(requests)
    ]
    return [*firsts, *(task.enlarged for task in firsts if task.enlarged)]


def _task(place: int, request: GenerateOptions, sketch: Sketch | None) -> Task:
    if sketch is None:
        task = Task(place, request, request.size, levels_of(request))
    else:
        task = Task(place, request, sketch.size, levels_of(request, sketch.strength), sketch)
    return replace(task, enlarged=_enlarged(task)) if request.hires else task


def _enlarged(task: Task) -> Task:
    """The same over its own picture, larger."""
    request, strength = replace(task.request, sigmas=(), strength_mode="steps"), task.request.hires_strength
    assert request.hires is not None
    before = task.size if task.sketch is None else task.sketch.finished_size
    width, height = (round(side * request.hires) // SIZE_MULTIPLE * SIZE_MULTIPLE for side in before)
    sketch = Sketch((width, height), (width, height), strength, key=object())
    return Task(task.place, request, sketch.size, levels_of(request, strength), sketch)
