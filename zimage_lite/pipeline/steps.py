"""The Euler loop of images that are drawn alike, several at once where that pays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..config import VAE_FACTOR, GenerateOptions
from ..memory.hardware import Hardware
from ..model.linear import Stream
from ..model.scheduler import euler_step, guided, initial_noise, model_time, sigmas
from ..model.transformer import Caption, Modulation, Ropes, Transformer, Watch
from .finite import all_finite
from .weights import Component, time_weights


@dataclass(frozen=True)
class Schedule:
    """sigmas: [steps + 1] float32; modulations: what each step takes, on the device."""

    sigmas: Tensor
    modulations: Sequence[Modulation]

    def __len__(self) -> int:
        return len(self.modulations)


def schedule(component: Component, steps: int, shift: float, hardware: Hardware) -> Schedule:
    """Computed on the CPU, from weights that are read for it and are not needed afterwards."""
    assert isinstance(component.model, Transformer)
    noise = sigmas(steps, shift)
    times = torch.cat([model_time(sigma) for sigma in noise[:-1]])
    with time_weights(component, hardware) as stream:
        found = component.model.modulations(times, hardware.dtype, stream)
    return Schedule(noise, [modulation.to(hardware.device) for modulation in found])


@dataclass
class NotFiniteError(Exception):
    """A step gave NaN or infinite values. latents: before it; step: counts from 0."""

    latents: list[Tensor]
    step: int


@dataclass(frozen=True)
class Batch:
    """Images that take their steps together, and what they are told."""

    requests: Sequence[GenerateOptions]
    captions: Mapping[str, Caption]  # by text
    schedule: Schedule

    def start(self, channels: int, device: torch.device) -> list[Tensor]:
        """What each image begins as: the noise of its seed, [channels, height/8, width/8] float32."""
        sizes = [(request.size[1] // VAE_FACTOR, request.size[0] // VAE_FACTOR) for request in self.requests]
        seeds = [request.seed for request in self.requests]
        return [initial_noise(seed, channels, *size).to(device) for seed, size in zip(seeds, sizes, strict=True)]

    def denoised(self, model: Transformer, hardware: Hardware, stream: Stream) -> Iterator[list[Tensor]]:
        """The latents after each step, of each image. Raises NotFiniteError."""
        latents = self.start(model.config.in_channels, hardware.device)
        ropes = model.ropes(*self._given(latents, hardware.dtype))
        for step, (sigma, sigma_next) in enumerate(pairwise(self.schedule.sigmas)):
            velocities = self.velocities(model, latents, step, hardware.dtype, stream, ropes=ropes)
            before, latents = latents, [
                euler_step(latent, velocity, sigma, sigma_next)
                for latent, velocity in zip(latents, velocities, strict=True)
            ]  # fmt: skip
            if not all_finite(latents):
                raise NotFiniteError(before, step)
            yield latents

    def velocities(
        self, model: Transformer, latents: list[Tensor], step: int, dtype: torch.dtype, stream: Stream,
        watch: Watch | None = None, ropes: Ropes | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """From each image towards noise, float32: of all in one pass over the weights, and with guidance of both sides
        of each."""
        given, captions = self._given(latents, dtype)
        outputs = iter(model(given, captions, self.schedule.modulations[step], stream, watch, ropes))
        results = []
        for request in self.requests:
            sides = [next(outputs).float() for _ in texts(request)]
            results.append(-(guided(sides[0], sides[1], request.guidance) if request.guidance else sides[0]))
        return results

    def _given(self, latents: list[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Caption]]:
        """What the model sees: each image once for every text that it is told."""
        told = [texts(request) for request in self.requests]
        given = [latent.to(dtype) for latent, of in zip(latents, told, strict=True) for _ in of]
        return given, [self.captions[text] for of in told for text in of]


def texts(request: GenerateOptions) -> list[str]:
    """The prompt, and with guidance what to steer away from."""
    return [request.prompt, request.negative] if request.guidance else [request.prompt]
