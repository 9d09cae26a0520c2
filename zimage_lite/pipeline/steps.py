"""The loop over noise levels, of images that are drawn alike, several at once where that pays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from ..config import GenerateOptions
from ..memory.hardware import Hardware
from ..model.blending import feathered
from ..model.controlnet import (
    Control,
    ControlledTransformer,
    ControlModulation,
    ControlNet,
    DiffusersControl,
    Several,
)
from ..model.linear import Stream
from ..model.samplers import SAMPLERS
from ..model.scheduler import guided, model_time, norm_limited
from ..model.transformer import Beside, Caption, Modulation, Ropes, Transformer, Watch
from ..plan.tiles import Tile
from .controls import UNCONTROLLED, ControlSet
from .finite import all_finite
from .walk import Image, Walk
from .weights import Component, time_weights
from .words import Words, words


@dataclass(frozen=True)
class Schedule:
    """sigmas: [steps + 1] float32; modulations: what each step takes, on the device; controls: of each ControlNet."""

    sigmas: Tensor
    modulations: Sequence[Modulation]
    controls: Sequence[Sequence[ControlModulation]] = ()

    def __len__(self) -> int:
        return len(self.modulations)


def schedule(component: Component, sigmas: Tensor, hardware: Hardware) -> Schedule:
    """sigmas: [steps + 1] float32. Computed on the CPU, from weights that are read for it and are not needed
    afterwards."""
    times = torch.cat([model_time(sigma) for sigma in sigmas[:-1]])
    return Schedule(sigmas, *modulations(component, times, hardware))


def modulations(
    component: Component, times: Tensor, hardware: Hardware
) -> tuple[list[Modulation], list[list[ControlModulation]]]:
    """times: [T] float32. -> what evaluations at these times take, on the device; and of each ControlNet. The same
    weights must not be open meanwhile."""
    model, dtype = component.model, hardware.dtype
    assert isinstance(model, Transformer)
    nets = model.controls if isinstance(model, ControlledTransformer) else ()
    with time_weights(component, hardware) as stream:
        found, condition = model.modulations(times, dtype, stream), model.condition(times)
        controls = [net.modulations(condition, dtype, stream) for net in nets]  # type: ignore[operator]
    there = [modulation.to(hardware.device) for modulation in found]
    return there, [[own.to(hardware.device) for own in of_net] for of_net in controls]


class KnownRopes:
    """Of the evaluation before, where they are the same."""

    def __init__(self) -> None:
        self._known: tuple[object, Ropes] | None = None  # with what they are of

    def of(self, model: Transformer, inputs: list[Tensor], captions: list[Caption]) -> Ropes:
        alike = [latent.shape for latent in inputs], [caption.layout for caption in captions]
        if self._known is None or self._known[0] != alike:
            self._known = alike, model.ropes(inputs, captions)
        return self._known[1]


@dataclass
class NotFiniteError(Exception):
    """A step gave NaN or infinite values. given: what the model saw; step: counts from 0."""

    given: list[Tensor]
    step: int


@dataclass
class Batch:
    """Images that take their steps together, and what they are told. tiles: what the model sees of each at a time;
    controls: ControlNets beside the model."""

    images: Sequence[Image]
    captions: Mapping[Words, Caption]
    schedule: Schedule
    tiles: Sequence[Tile]
    controls: ControlSet = UNCONTROLLED
    _ropes: KnownRopes = field(default_factory=KnownRopes, init=False)
    _contexts: list[list[Tensor]] = field(default_factory=list, init=False)  # of each ControlNet, of each image

    @property
    def controlled(self) -> tuple[bool, ...]:
        """Of each pass over the model, whether ControlNets are asked."""
        return self.controls.asked(self._sampler, self.schedule.sigmas, len(self.tiles))

    def denoised(self, model: Transformer, hardware: Hardware, stream: Stream) -> Iterator[list[Walk]]:
        """Each image after each step. Raises NotFiniteError."""
        sigmas, channels = self.schedule.sigmas, model.config.in_channels
        self._contexts = [
            [image.contexts[i].to(hardware.device, hardware.dtype) for image in self.images]
            for i in range(len(self.controls.nets))
        ]
        walks, evaluated = [Walk(image, sigmas, channels, hardware.device) for image in self.images], 0
        while walks[0].result is None:
            given, step = [walk.given() for walk in walks], walks[0].index
            velocities = self.velocities(model, given, step, hardware.dtype, stream)
            for walk, seen, velocity in zip(walks, given, velocities, strict=True):
                walk.go(seen, velocity)
            if not all_finite(velocities):
                raise NotFiniteError(given, step)
            evaluated += 1
            if evaluated % SAMPLERS[self._sampler].evaluations_per_step == 0 or walks[0].result is not None:
                yield walks
        self._contexts = []

    def velocities(
        self, model: Transformer, given: list[Tensor], step: int, dtype: torch.dtype, stream: Stream,
        watch: Watch | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """From each image towards noise, float32: of all in one pass over the weights for each tile, and with guidance
        of both sides of each."""
        found = [self._of_tile(model, given, tile, step, dtype, stream, watch) for tile in self.tiles]
        if len(found) == 1:
            return found[0]
        places = [(tile.top, tile.left) for tile in self.tiles]
        return [
            feathered(pieces, places, *own.shape[1:])
            for pieces, own in zip(zip(*found, strict=True), given, strict=True)
        ]

    def _of_tile(
        self, model: Transformer, given: list[Tensor], tile: Tile, step: int, dtype: torch.dtype, stream: Stream,
        watch: Watch | None,
    ) -> list[Tensor]:  # fmt: skip
        down, across = slice(tile.top, tile.top + tile.height), slice(tile.left, tile.left + tile.width)
        sigma, steps = float(self.schedule.sigmas[step]), len(self.schedule)
        told = [words(image.request, step, steps, sigma) for image in self.images]
        inputs = [latent[:, down, across].to(dtype) for latent, own in zip(given, told, strict=True) for _ in own]
        seen = [
            [context[:, down, across] for context, own in zip(contexts, told, strict=True) for _ in own]
            for contexts in self._contexts
        ]
        captions = [self.captions[side] for own in told for side in own]
        ropes = self._ropes.of(model, inputs, captions)
        controls = self._beside(model, captions, seen, step)
        outputs = iter(model(inputs, captions, self.schedule.modulations[step], stream, watch, ropes, controls))
        sides = [[next(outputs).float() for _ in own] for own in told]
        return [-followed(image.request, *own) for image, own in zip(self.images, sides, strict=True)]

    def _beside(
        self, model: Transformer, captions: Sequence[Caption], seen: Sequence[Sequence[Tensor]], step: int
    ) -> Beside | None:
        """seen: by each ControlNet, of each sequence of the evaluation."""
        if not self.controls.runs(step, len(self.schedule)):
            return None
        times = [of_net[step] for of_net in self.schedule.controls]
        return beside(model, self.controls, captions, seen, self.schedule.modulations[step], times)

    @property
    def _sampler(self) -> str:
        return self.images[0].request.sampler


def beside(
    model: Transformer, controls: ControlSet, captions: Sequence[Caption], seen: Sequence[Sequence[Tensor]],
    modulation: Modulation, times: Sequence[ControlModulation],
) -> Beside:  # fmt: skip
    """What ControlNets do in an evaluation. captions: of each sequence; seen: by each ControlNet, of each sequence;
    modulation: the transformer's, and times: that of each ControlNet."""
    assert isinstance(model, ControlledTransformer)
    kind: type[Control] = Control
    more: dict[str, Any] = {}
    if controls.copies:
        kind, more = DiffusersControl, {"refiner": modulation.noise_refiner}
    found = [
        kind(
            net=cast(ControlNet, net), contexts=contexts, captions=captions, modulation=own,
            pad_token=model.x_pad_token, scale=scale, **more,
        )
        for net, contexts, own, scale in zip(model.controls, seen, times, controls.scales, strict=True)
    ]  # fmt: skip
    return found[0] if len(found) == 1 else Several(found)


def followed(request: GenerateOptions, positive: Tensor, negative: Tensor | None = None) -> Tensor:
    """What the model says of the prompt, and with guidance of what to steer away from, as one."""
    if negative is None:
        return positive
    assert request.guidance is not None
    found = guided(positive, negative, request.guidance)
    return norm_limited(found, positive, request.cfg_normalization) if request.cfg_normalization else found
