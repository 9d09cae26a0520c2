"""One image on its way from noise to data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import VAE_FACTOR, GenerateOptions
from ..model.blending import blended, mask_at, renoised
from ..model.omni import Seen
from ..model.samplers import SAMPLERS
from ..model.scheduler import initial_noise


@dataclass(frozen=True)
class Source:
    """What an image is made from. latent: [channels, height/8, width/8] float32, without noise; mask: [height/8,
    width/8], 1 where it may change, None if it may everywhere; sampled: noise was drawn for it before the image's."""

    latent: Tensor
    mask: Tensor | None = None
    sampled: bool = False


@dataclass(frozen=True)
class Image:
    """One that is to be denoised. place: among those that were asked for; size: width and height in pixels; contexts:
    what each ControlNet sees, [channels, height/8, width/8] float32; references: what an Omni sees, float32 on the
    CPU."""

    place: int
    request: GenerateOptions
    size: tuple[int, int]
    source: Source | None = None
    contexts: tuple[Tensor, ...] = ()
    references: tuple[Seen, ...] = ()


class Walk:
    """The steps of a sampler, and around what changes the picture as it was, at the noise level of each step.

    index: of the noise level that the model is asked at; x0: its last guess of the image without noise; result: the
    last, once there is one.
    """

    def __init__(self, image: Image, sigmas: Tensor, channels: int, device: torch.device) -> None:
        request, self._source, self.sigmas = image.request, image.source, sigmas.tolist()
        shape = channels, image.size[1] // VAE_FACTOR, image.size[0] // VAE_FACTOR
        sampled = self._source is not None and self._source.sampled
        self._noise = initial_noise(request.seed, *shape, drawn_before=int(sampled)).to(device)
        self._latent, self._mask = torch.zeros((), device=device), None
        if self._source:
            self._latent = self._source.latent.to(device)
            self._mask = None if self._source.mask is None else self._source.mask.to(device)
        start = renoised(self._latent, self._noise, self.sigmas[0])
        self._steps = SAMPLERS[request.sampler].steps(start, sigmas, _draws(request.seed + 1, shape, device))
        self.x, self.index = next(self._steps)
        self.x0: Tensor | None = None
        self.result: Tensor | None = None

    @property
    def sigma(self) -> float:
        return float(self.sigmas[self.index])

    def given(self) -> Tensor:
        """What the model sees, float32."""
        mask = self._mask_now()
        return self.x if mask is None else blended(self.x, renoised(self._latent, self._noise, self.sigma), mask)

    def go(self, given: Tensor, velocity: Tensor) -> None:
        """velocity: from `given` towards noise, float32."""
        self.x0 = blended(given - self.sigma * velocity, self._latent, self._mask_now())
        try:
            self.x, self.index = self._steps.send(self.x0)
        except StopIteration as end:
            self.result = end.value

    def _mask_now(self) -> Tensor | None:
        return None if self._mask is None else mask_at(self._mask, self.sigma, self.sigmas[0])


def _draws(seed: int, shape: tuple[int, ...], device: torch.device) -> Callable[[], Tensor]:
    """Fresh noise for samplers that add some. From the CPU, so that every device draws the same."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator).to(device)
