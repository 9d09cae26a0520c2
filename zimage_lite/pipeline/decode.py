"""Last phase: latents -> pixels, each image whole or in bands of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast

from torch import Tensor

from ..memory.hardware import Hardware
from ..memory.plan import Plan
from ..memory.plan_vae import VaePlan
from ..model.vae import Decoder, to_pixels
from ..plan.job import Job
from ..plan.vae_phases import ways_to_decode
from .finite import require_finite
from .vae_phase import VaePhase, banded
from .workspace import WaysOn


class Decode(VaePhase):
    half = "decoder"

    def ways(self, job: Job) -> WaysOn:
        """What there is to plan."""
        return partial(ways_to_decode, self.sizes, job)

    def run(
        self, latents: Sequence[Tensor], done: int, plan: Plan, finish: Callable[[Tensor], Tensor] = to_pixels
    ) -> Iterator[Tensor]:
        """-> images [height, width, 3] uint8 on the CPU, of latents[done:]; or what `finish` makes of what the decoder
        gives."""

        def pixels(decoder: Decoder, latent: Tensor, hardware: Hardware) -> Tensor:
            image = decode_as_planned(decoder, latent.to(hardware.device), plan.way)
            require_finite([image], self.model.vae, "the decoded image", hardware.dtype)
            return finish(image).cpu()

        return self.each(latents[done:], pixels, plan)


def decode_as_planned(decoder: Decoder, latent: Tensor, plan: VaePlan) -> Tensor:
    """-> image [3, height, width] in the compute dtype, on the device."""
    return banded(plan).decode(decoder, latent) if plan.rows_per_band else cast(Tensor, decoder(latent))
