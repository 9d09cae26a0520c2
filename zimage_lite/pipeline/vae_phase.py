"""What encoding pictures and decoding latents share: half of the VAE, open while they go through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..checkpoint.model_files import ModelFiles
from ..memory.hardware import Hardware
from ..memory.heap import give_back, mapped
from ..memory.plan import Plan
from ..memory.plan_vae import VaePlan
from ..model.banded import Banded
from ..model.linear import release
from ..model.vae import HALVES
from ..plan.model_sizes import Model
from .weights import Component, read_into
from .workspace import Workspace

_Item = TypeVar("_Item")


class VaePhase:
    half: ClassVar[str]  # "encoder" or "decoder"

    def __init__(self, model: ModelFiles, sizes: Model, work: Workspace) -> None:
        self.model, self.sizes, self.work = model, sizes, work

    @cached_property
    def component(self) -> Component:
        return Component(nn.ModuleDict({self.half: HALVES[self.half](self.model.vae.config)}), self.model.vae, ())

    def each(
        self, items: Sequence[_Item], compute: Callable[[Any, _Item, Hardware], Tensor], plan: Plan
    ) -> Iterator[Tensor]:
        """What compute(encoder or decoder, item, hardware) gives for each item."""
        hardware, model, meter = self.work.hardware_of(plan), self.component.model, self.work.meter
        half = model.get_submodule(self.half)
        self.work.note(plan)
        try:
            with meter.phase(plan.phase):
                read_into(model, self.component.rest, hardware)
            for item in items:
                with meter.phase(plan.phase), mapped() if hardware.device.type == "cpu" else nullcontext():
                    result = compute(half, item, hardware)
                yield result
        finally:
            release(model)
            give_back(0)
            if hardware.device.type == "cuda":
                torch.cuda.empty_cache()

    def release(self) -> None:
        if "component" in vars(self):  # else it was never made
            release(self.component.model)


def banded(plan: VaePlan) -> Banded:
    """In bands as planned."""
    store = torch.device("cpu") if plan.spilled else None
    return Banded(plan.rows_per_band, plan.store_input, plan.store_hidden, store)
