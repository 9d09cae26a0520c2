"""First phase, if there are pictures to start from: pixels -> latents, each picture whole or in bands of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import cast

from torch import Tensor

from ..errors import UserError
from ..memory.hardware import Hardware
from ..memory.plan import Plan
from ..memory.plan_vae import VaePlan
from ..model.vae import Encoder, from_pixels, latent_of
from ..plan.job import Job
from ..plan.vae_phases import ways_to_encode_pictures
from .finite import require_finite
from .vae_phase import VaePhase, banded
from .workspace import WaysOn


class EncodePictures(VaePhase):
    half = "encoder"

    def ways(self, job: Job) -> WaysOn:
        """What there is to plan. Raises UserError if the VAE cannot encode."""
        vae = self.model.vae
        if not vae.under(self.half):
            raise UserError(
                f"{vae.source}: this VAE has a decoder and no encoder, so it cannot read a picture",
                fix="name a whole one with --vae: Z-Image's vae/, or Flux.1's ae.safetensors",
            )
        _ = self.component.wanted  # raises what it lacks
        return partial(ways_to_encode_pictures, self.sizes, job)

    def run(
        self, pictures: Sequence[Tensor], noises: Sequence[Tensor | None], done: int, plan: Plan
    ) -> Iterator[Tensor]:
        """-> latents [latent_channels, height / 8, width / 8] float32 on the CPU, scaled as the transformer wants them,
        of pictures[done:], each [height, width, 3] uint8, or float32 of the same range. noises: of a picture None for
        the mean of its posterior, or float32 of the latent's shape for a sample, as diffusers draws it."""

        def latent(encoder: Encoder, given: tuple[Tensor, Tensor | None], hardware: Hardware) -> Tensor:
            picture, noise = given
            image = from_pixels(picture.to(hardware.device), hardware.dtype)
            return latent_of(self._moments(encoder, image, plan, hardware), encoder.config, noise)

        return self.each(list(zip(pictures, noises, strict=True))[done:], latent, plan)

    def moments(self, images: Sequence[Tensor], done: int, plan: Plan) -> Iterator[Tensor]:
        """As of `Encoder.forward`, float32 on the CPU, of images[done:], each [3, height, width] in [-1, 1]."""

        def compute(encoder: Encoder, image: Tensor, hardware: Hardware) -> Tensor:
            return self._moments(encoder, image.to(hardware.device, hardware.dtype), plan, hardware).float()

        return self.each(images[done:], compute, plan)

    def _moments(self, encoder: Encoder, image: Tensor, plan: Plan, hardware: Hardware) -> Tensor:
        moments = encode_as_planned(encoder, image, plan.way)
        require_finite([moments], self.model.vae, "the picture's latent", hardware.dtype)
        return moments.cpu()


def encode_as_planned(encoder: Encoder, image: Tensor, plan: VaePlan) -> Tensor:
    """image: [3, height, width] in the compute dtype, on the device -> moments, as of `Encoder.forward`."""
    return banded(plan).encode(encoder, image) if plan.rows_per_band else cast(Tensor, encoder(image))
