"""A phase before the images that see pictures: references -> features, by the vision tower, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial

from torch import Tensor
from zimage_kernels import Backend

from ..checkpoint.model_files import ModelFiles
from ..memory.plan import Plan
from ..model.linear import release
from ..model.vision import VisionTower
from ..plan.job import Job
from ..plan.model_sizes import Model
from ..plan.vision_terms import ways_to_look
from .finite import require_finite
from .references import Reference
from .weights import Component
from .workspace import WaysOn, Workspace


class Look:
    """unpacking: what unpacks the tower's weights, which are never multiplied in 8 bits."""

    def __init__(self, model: ModelFiles, sizes: Model, unpacking: Backend, work: Workspace) -> None:
        self.model, self.sizes, self.unpacking, self.work = model, sizes, unpacking, work

    @cached_property
    def component(self) -> Component:
        tower = self.model.siglip
        assert tower is not None, "require_seeing has found it"
        return Component(VisionTower(tower.config, self.unpacking), tower, ("encoder.layers",))

    def ways(self, job: Job) -> WaysOn:
        """What there is to plan."""
        return partial(ways_to_look, self.sizes, job)

    def run(self, references: Sequence[Reference], done: int, plan: Plan) -> Iterator[Tensor]:
        """-> [rows, columns, hidden_size] float32 on the CPU, of references[done:], one after another."""
        hardware, component = self.work.hardware_of(plan), self.component
        todo = references[done:]
        with self.work.open(component, plan) as weights, weights.passes(len(todo)) as stream:
            for reference in todo:
                patches = reference.patches().to(hardware.device, hardware.dtype)
                (features,) = component.model([patches], [reference.shape.grid], stream)
                require_finite([features], component.checkpoint, "what the vision tower sees", hardware.dtype)
                yield features.float().cpu()

    def release(self) -> None:
        if "component" in vars(self):  # else it was never made
            release(self.component.model)
