"""Second phase: noise -> latents, over a number of steps.

What is drawn differently joins here: what images start from and the rule of a step are `walk.py`'s, what the model is
asked in a step `steps.py`'s; a caller sees each step in `Denoise.run`, and whatever streams beside the transformer is
opened where it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import cast

from torch import Tensor
from zimage_kernels import Backend

from ..adapters.joined import AdapterSet
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.model_files import ModelFiles
from ..memory.hardware import Hardware
from ..memory.plan import Plan
from ..model.compute import Compute
from ..model.controlnet import CONTROLS, ControlledTransformer, control_lists
from ..model.linear import Stream, release
from ..model.transformer import Caption, Transformer
from ..plan.job import Job, batched, padded
from ..plan.model_sizes import Model
from ..plan.prediction import ways_to_denoise
from .controls import ControlSet
from .finite import overflow, raise_at_first_non_finite, raise_if_damaged, require_finite
from .steps import Batch, NotFiniteError, Schedule, schedule
from .walk import Image, Walk
from .weights import Component, Weights
from .words import Words, all_words
from .workspace import Count, WaysOn, Workspace

BLOCKS = ("context_refiner", "noise_refiner", "layers")  # come and go


@dataclass(frozen=True)
class Step:
    """What a caller is told after each step of each image. image: its place among those asked for; step: from 1, of
    `of`; sigma: the noise level that was left behind; x0: the guess of the image without noise, [channels, height/8,
    width/8] float32, on the device: who does not look at it does not wait for it."""

    image: int
    step: int
    of: int
    sigma: float
    x0: Tensor


OnStep = Callable[[Step], object]  # raises what stops the run


class Denoise:
    """compute: what the transformer computes with; projecting: what multiplies by the narrow halves of adapters."""

    def __init__(
        self, model: ModelFiles, sizes: Model, compute: Compute, work: Workspace, projecting: Backend | None = None
    ) -> None:
        self.model, self.sizes, self.compute, self.work = model, sizes, compute, work
        self.projecting = projecting
        self._beside: tuple[ControlSet, Component] | None = None

    @cached_property
    def component(self) -> Component:
        return self._component(Transformer(self.model.transformer.config, self.compute), self.model.transformer, BLOCKS)

    def _component(self, skeleton: Transformer, checkpoint: Checkpoint, blocks: tuple[str, ...]) -> Component:
        reencoded = self.compute.backend if self.compute.int8 else None
        return Component(skeleton, checkpoint, blocks, reencoded, projecting=self.projecting)

    @property
    def transformer(self) -> Transformer:
        return cast(Transformer, self.component.model)

    def _controlled(self, controls: ControlSet) -> Component:
        """The transformer with ControlNets beside it, as one. Kept while the same ones are asked for."""
        if self._beside is None or self._beside[0] is not controls:
            transformer, configs = self.model.transformer, [net.config for net in controls.nets]
            skeleton = ControlledTransformer(transformer.config, configs, self.compute)
            blocks = (*BLOCKS, *control_lists(len(configs)))
            self._beside = controls, self._component(skeleton, controls.joined(transformer), blocks)
        return self._beside[1]

    def ways(self, job: Job) -> WaysOn:
        """What there is to plan."""
        return partial(ways_to_denoise, self.sizes, job)

    def whole(self, adapters: AdapterSet, controls: ControlSet) -> Component:
        """The transformer, what is added to it and what stands beside it."""
        component = self._controlled(controls) if controls else self.component
        return replace(component, adapters=adapters) if adapters else component

    def schedule(
        self, sigmas: Tensor, adapters: AdapterSet, controls: ControlSet, done: int, plan: Plan
    ) -> Iterator[Schedule]:
        """What all images of a group share: of the same noise levels, adapters and ControlNets. One, to be run as a
        phase is."""
        component, hardware = self.whole(adapters, controls), self.work.hardware_of(plan)
        with self.work.meter.phase("denoise"):
            found = schedule(component, sigmas, hardware)
        yield found

    def run(
        self, images: Sequence[Image], embeddings: Mapping[str, Tensor], times: Schedule, job: Job,
        controls: ControlSet, count: Count, on_step: OnStep | None, done: int, plan: Plan,
    ) -> Iterator[Tensor]:  # fmt: skip
        """-> latents [channels, height/8, width/8] float32 on the CPU, of images[done:]. count: of steps."""
        hardware, todo, failed = self.work.hardware_of(plan), images[done:], None
        with self.work.open(self.whole(job.adapters, controls), plan) as weights:
            model = cast(Transformer, weights.component.model)
            captions = self._captions(model, weights, todo, embeddings, hardware)
            batches = [
                Batch(todo[i : i + plan.way], captions, times, job.tiles, controls)
                for i in range(0, len(todo), plan.way)
            ]
            with _passes(weights, [asked for batch in batches for asked in batch.controlled]) as stream:
                for batch in batches:
                    try:
                        walks = self._walked(batch, model, stream, hardware, count, on_step)
                    except NotFiniteError as error:
                        failed = batch, error.with_traceback(None)
                        break
                    yield from (latent.cpu() for latent in walks)
            if failed:
                self._explain(*failed, weights, hardware)

    def _walked(
        self, batch: Batch, model: Transformer, stream: Stream, hardware: Hardware, count: Count,
        on_step: OnStep | None,
    ) -> list[Tensor]:  # fmt: skip
        """Its latents, on the device."""
        start, steps, walks = time.perf_counter(), len(batch.schedule), list[Walk]()
        for done, walks in enumerate(batch.denoised(model, hardware, stream), start=1):
            count.add(len(walks))
            start, before = time.perf_counter(), start
            self.work.meter.step_seconds.append(round(start - before, 4))
            self.work.meter.steps += len(walks)
            if on_step:
                sigma = float(batch.schedule.sigmas[done - 1])
                for image, walk in zip(batch.images, walks, strict=True):
                    on_step(Step(image.place, done, steps, sigma, cast(Tensor, walk.x0)))
        return [cast(Tensor, walk.result) for walk in walks]

    def release(self) -> None:
        if "component" in vars(self):  # else it was never made
            release(self.component.model)
        if self._beside:
            release(self._beside[1].model)

    def _captions(
        self, model: Transformer, weights: Weights, images: Sequence[Image], embeddings: Mapping[str, Tensor],
        hardware: Hardware,
    ) -> dict[Words, Caption]:  # fmt: skip
        """Refined once, for all steps of all images."""
        prompts = list(dict.fromkeys(words for image in images for words in all_words(image.request)))
        batches, refined = batched(prompts, lambda words: padded(len(embeddings[words.text]))), list[Caption]()
        with weights.prelude(len(batches)) as stream:
            for batch in batches:
                told = [words.told(embeddings[words.text]).to(hardware.device) for words in batch]
                refined += model.refine_captions(told, stream)
        tokens = [caption.tokens for caption in refined]
        require_finite(tokens, self.model.transformer, "the refined prompt", hardware.dtype)
        return dict(zip(prompts, refined, strict=True))

    def _explain(self, batch: Batch, error: NotFiniteError, weights: Weights, hardware: Hardware) -> None:
        """Raise UserError saying where values stop being finite."""
        for checkpoint in (self.model.transformer, *(net.checkpoint for net in batch.controls.nets)):
            raise_if_damaged(checkpoint)
        where = f"step {error.step + 1} of {len(batch.schedule)}"
        watch = raise_at_first_non_finite(where, hardware.dtype)
        model = cast(Transformer, weights.component.model)
        with _passes(weights, [batch.controls.runs(error.step, len(batch.schedule))] * len(batch.tiles)) as stream:
            batch.velocities(model, error.given, error.step, hardware.dtype, stream, watch)
        raise overflow(f"{where}: the latent has", hardware.dtype)  # of finite parts


def _passes(weights: Weights, controlled: Sequence[bool]) -> AbstractContextManager[Stream]:
    """controlled: of each pass, whether the blocks of ControlNets run in it."""
    beside = frozenset(name for name in weights.component.blocks if name.startswith(f"{CONTROLS}."))
    idle = [frozenset[str]() if asked else beside for asked in controlled]
    return weights.passes(len(controlled), idle)
