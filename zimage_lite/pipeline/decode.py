"""Third phase: latents -> pixels, each image whole or in bands of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from typing import cast

import torch
from torch import Tensor, nn

from ..checkpoint.model_files import ModelFiles
from ..memory.heap import mapped
from ..memory.plan import Plan
from ..memory.plan_vae import VaePlan
from ..model.banded import Banded
from ..model.linear import release
from ..model.vae import Decoder, to_pixels
from ..plan.job import Job
from ..plan.model_sizes import Model
from ..plan.prediction import ways_to_decode
from .finite import require_finite
from .weights import Component, read_into
from .workspace import WaysOn, Workspace


class Decode:
    def __init__(self, model: ModelFiles, sizes: Model, work: Workspace) -> None:
        self.model, self.sizes, self.work = model, sizes, work

    @cached_property
    def component(self) -> Component:
        return Component(nn.ModuleDict({"decoder": Decoder(self.model.vae.config)}), self.model.vae, ())

    def ways(self, job: Job) -> WaysOn:
        """What there is to plan."""
        return partial(ways_to_decode, self.sizes, job)

    def run(self, latents: Sequence[Tensor], done: int, plan: Plan) -> Iterator[Tensor]:
        """-> images [height, width, 3] uint8 on the CPU, of latents[done:]."""
        hardware, model, meter = self.work.hardware_of(plan), self.component.model, self.work.meter
        decoder = cast(Decoder, model.get_submodule("decoder"))
        self.work.note(plan)
        try:
            with meter.phase("decode"):
                read_into(model, self.component.rest, hardware)
            for latent in latents[done:]:
                with meter.phase("decode"), mapped() if hardware.device.type == "cpu" else nullcontext():
                    image = decode_as_planned(decoder, latent.to(hardware.device), plan.way)
                    require_finite([image], self.model.vae, "the decoded image", hardware.dtype)
                    pixels = to_pixels(image).cpu()
                    del image
                yield pixels
        finally:
            release(model)
            if hardware.device.type == "cuda":
                torch.cuda.empty_cache()

    def release(self) -> None:
        if "component" in vars(self):  # else it was never made
            release(self.component.model)


def decode_as_planned(decoder: Decoder, latent: Tensor, plan: VaePlan) -> Tensor:
    """-> image [3, height, width] in the compute dtype, on the device."""
    if not plan.rows_per_band:
        return cast(Tensor, decoder(latent))
    store = torch.device("cpu") if plan.spilled else None
    return Banded(plan.rows_per_band, plan.store_input, plan.store_hidden, store).decode(decoder, latent)
