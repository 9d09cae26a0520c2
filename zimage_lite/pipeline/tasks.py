"""What is asked for, as images to draw: sizes, noise levels, and the pictures that they are made from."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..config import SIZE_MULTIPLE, GenerateOptions, VisionConfig
from ..errors import UserError
from ..model.omni import Seen
from ..plan.job import SeenShape
from .controls import UNCONTROLLED, ControlSet
from .levels import levels_of
from .references import Reference, references_of
from .sights import SeenPicture, Sight, sights_of
from .sketch import Sketch, sketch_of
from .walk import Image, Source


@dataclass(frozen=True)
class Task:
    """One image to be drawn. place: among those that were asked for; request: complete; size: width and height that
    the model draws; sigmas: from the first noise level to 0; sketch: what it is made from; enlarged: what is made from
    it in turn; controls: ControlNets, and sights: what each of them sees; references: what the model sees beside the
    prompt."""

    place: int
    request: GenerateOptions
    size: tuple[int, int]
    sigmas: tuple[float, ...]
    sketch: Sketch | None = None
    enlarged: Task | None = None
    controls: ControlSet = UNCONTROLLED
    sights: tuple[Sight, ...] = ()
    references: tuple[Reference, ...] = ()

    @property
    def shapes(self) -> tuple[SeenShape, ...]:
        """Of references."""
        return tuple(reference.shape for reference in self.references)

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def pictures(self) -> list[Sketch | SeenPicture]:
        """That it is made from, and that its ControlNets see."""
        seen = [picture for sight in self.sights for picture in sight.pictures]
        return [*([self.sketch] if self.sketch else []), *seen]

    def begun(
        self, sources: Mapping[Hashable, Source], contexts: Mapping[Hashable, Tensor], seen: Mapping[Hashable, Seen]
    ) -> Image:
        """What sketches, sights and references have become, by their keys."""
        source = sources[self.sketch.key] if self.sketch else None
        followed = tuple(contexts[sight.key] for sight in self.sights)
        looked_at = tuple(seen[reference.key] for reference in self.references)
        return Image(self.place, self.request, self.size, source, followed, looked_at)


def tasks_of(
    requests: Iterable[GenerateOptions], channels: int, default_size: tuple[int, int],
    controls: Callable[[GenerateOptions], ControlSet], patch: int = VisionConfig.patch_size,
) -> list[Task]:  # fmt: skip
    """requests: complete. channels: of latents; patch: of the vision tower. Those that enlarge another come after all
    others. Raises UserError."""
    sketches, known = dict[Hashable, Sketch](), dict[Hashable, Reference]()
    firsts = [
        _task(
            place, request, sketch_of(request, channels, default_size, sketches), references_of(request, patch, known)
        )
        for place, request in enumerate(requests)
    ]
    seen: dict[Hashable, SeenPicture] = {}
    tasks = [*firsts, *(task.enlarged for task in firsts if task.enlarged)]
    return [_controlled(task, controls(task.request), seen) for task in tasks]


def _controlled(task: Task, controls: ControlSet, seen: dict[Hashable, SeenPicture]) -> Task:
    if not controls:
        return task
    sights = sights_of(task.request, task.size, task.sketch, [net.config for net in controls.nets], seen)
    for sight, use in zip(sights, controls.uses, strict=True):
        if not sight.pictures:
            masked = task.sketch is not None and task.sketch.masked
            why = "this ControlNet takes no mask" if masked else "there is neither a picture to follow nor a mask"
            raise UserError(f"{use.path}: {why}, so it has nothing to see", fix="name a picture with --control-image")
    sketch = task.sketch
    if controls.copies and sketch and any(sight.kept for sight in sights):
        sketch = replace(sketch, regenerates=True)
    in_force = [place for place, scale in enumerate(controls.scales) if scale]  # the others only have to be right
    followed = tuple(sights[place] for place in in_force)
    return replace(task, sketch=sketch, controls=controls.only(in_force), sights=followed)


def _task(place: int, request: GenerateOptions, sketch: Sketch | None, references: tuple[Reference, ...]) -> Task:
    if sketch is None:
        width, height = references[-1].shape.size if references else request.size
        size = request.width or width, request.height or height
        task = Task(place, request, size, levels_of(request), references=references)
    else:
        task = Task(place, request, sketch.size, levels_of(request, sketch.strength), sketch, references=references)
    return replace(task, enlarged=_enlarged(task)) if request.hires else task


def _enlarged(task: Task) -> Task:
    """The same over its own picture, larger; without ControlNets that saw only what a mask leaves."""
    controls = () if task.request.control_image is None else task.request.controls
    request = replace(task.request, sigmas=(), strength_mode="steps", controls=controls)
    strength = task.request.hires_strength
    assert request.hires is not None
    before = task.size if task.sketch is None else task.sketch.finished_size
    width, height = (round(side * request.hires) // SIZE_MULTIPLE * SIZE_MULTIPLE for side in before)
    sketch = Sketch((width, height), (width, height), strength, key=object())
    return Task(task.place, request, sketch.size, levels_of(request, strength), sketch, references=task.references)
