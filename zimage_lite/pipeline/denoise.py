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
from itertools import groupby
from typing import Any, cast

from torch import Tensor
from zimage_kernels import Backend

from ..adapters.joined import AdapterSet
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.model_files import ModelFiles
from ..config import Lora
from ..memory.plan import Plan
from ..model.compute import Compute
from ..model.controlnet import CONTROLS, ControlledTransformer, control_lists
from ..model.linear import Stream, release
from ..model.omni import REFINER, transformer
from ..model.transformer import Caption, Transformer
from ..plan.job import Job, batched, padded
from ..plan.model_sizes import Model
from ..plan.prediction import ways_to_denoise
from .controls import ControlSet
from .finite import overflow, raise_at_first_non_finite, raise_if_damaged, require_finite
from .references import told
from .steps import Batch, NotFiniteError, Schedule, schedule
from .walk import Image, Walk
from .weights import Component, Reencoded, Weights
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


Sets = Mapping[tuple[Lora, ...], tuple[AdapterSet, Schedule]]  # what each request's LoRAs are, and its schedule
Embeddings = Mapping[Any, Tensor]  # by the prompts that they are of
OnStep = Callable[[Step], object]  # raises what stops the run


class Denoise:
    """compute: what the transformer computes with; projecting: what multiplies by the narrow halves of adapters."""

    def __init__(
        self, model: ModelFiles, sizes: Model, compute: Compute, work: Workspace, projecting: Backend | None = None
    ) -> None:
        self.model, self.sizes, self.compute, self.work = model, sizes, compute, work
        self.projecting = projecting
        self._beside: tuple[ControlSet, Component] | None = None

    def twin(self) -> Denoise:
        """The same with skeletons of its own, which are bound and released apart from these."""
        return Denoise(self.model, self.sizes, self.compute, self.work, self.projecting)

    @cached_property
    def component(self) -> Component:
        blocks = (*BLOCKS, REFINER) if self.model.sees else BLOCKS
        return self._component(transformer(self.model.transformer.config, self.compute), self.model.transformer, blocks)

    def _component(self, skeleton: Transformer, checkpoint: Checkpoint, blocks: tuple[str, ...]) -> Component:
        reencoded: Reencoded = None
        if self.compute.int8:
            reencoded = "when read" if self.work.hardware.device.type == "cpu" else "before computing"
        return Component(skeleton, checkpoint, blocks, reencoded, projecting=self.projecting)

    @property
    def transformer(self) -> Transformer:
        return cast(Transformer, self.component.model)

    def _controlled(self, controls: ControlSet) -> Component:
        """The transformer with ControlNets beside it, as one. Kept while the same ones are asked for."""
        if self._beside is None or self._beside[0] is not controls:
            own, configs = self.model.transformer, [net.config for net in controls.nets]
            skeleton = ControlledTransformer(own.config, configs, self.compute)
            blocks = (*BLOCKS, *control_lists(len(configs)))
            self._beside = controls, self._component(skeleton, controls.joined(own), blocks)
        return self._beside[1]

    def ways(self, job: Job) -> WaysOn:
        """What there is to plan."""
        return partial(ways_to_denoise, self.sizes, job)

    def whole(self, controls: ControlSet) -> Component:
        """The transformer, and what stands beside it."""
        return self._controlled(controls) if controls else self.component

    def schedules(
        self, sigmas: Tensor, sets: Sequence[AdapterSet], controls: ControlSet, done: int, plan: Plan
    ) -> Iterator[Schedule]:
        """What images of the same noise levels, ControlNets and adapters share, of each set. To be run as a phase
        is."""
        component, hardware = self.whole(controls), self.work.hardware_of(plan)
        plain: Schedule | None = None
        for adapters in sets[done:]:
            if plain and not adapters.changes_times:
                yield plain
                continue
            with self.work.meter.phase("denoise"):
                found = schedule(replace(component, adapters=adapters), sigmas, hardware)
            plain = found if plain is None and not adapters.changes_times else plain
            yield found

    def run(
        self, images: Sequence[Image], embeddings: Embeddings, sets: Sets, job: Job, controls: ControlSet,
        count: Count, on_step: OnStep | None, done: int, plan: Plan,
    ) -> Iterator[Tensor]:  # fmt: skip
        """-> latents [channels, height/8, width/8] float32 on the CPU, of images[done:]. count: of steps."""
        alike = [(*sets[loras], list(own)) for loras, own in groupby(images[done:], lambda image: image.request.loras)]
        with self.work.open(replace(self.whole(controls), adapters=alike[0][0]), plan) as weights:
            captions = []
            for adapters, _, own in alike:  # of all before the first step: it takes the place of what stays then
                weights.change(adapters)
                captions.append(self._captions(weights, own, embeddings, job.look_tokens))
            for (adapters, times, own), words in zip(alike, captions, strict=True):
                weights.change(adapters)
                batches = [
                    Batch(own[i : i + plan.way], words, times, job.tiles, controls)
                    for i in range(0, len(own), plan.way)
                ]
                yield from self._denoised(weights, batches, count, on_step)

    def _denoised(
        self, weights: Weights, batches: Sequence[Batch], count: Count, on_step: OnStep | None
    ) -> Iterator[Tensor]:
        failed = None
        with _passes(weights, [asked for batch in batches for asked in batch.controlled]) as stream:
            for batch in batches:
                try:
                    walks = self._walked(batch, weights, stream, count, on_step)
                except NotFiniteError as error:
                    failed = batch, error.with_traceback(None)
                    break
                yield from (latent.cpu() for latent in walks)
        if failed:
            self._explain(*failed, weights)

    def _walked(
        self, batch: Batch, weights: Weights, stream: Stream, count: Count, on_step: OnStep | None
    ) -> list[Tensor]:
        """Its latents, on the device."""
        start, steps, walks = time.perf_counter(), len(batch.schedule), list[Walk]()
        for done, walks in enumerate(batch.denoised(_model(weights), weights.hardware, stream), start=1):
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
        self, weights: Weights, images: Sequence[Image], embeddings: Embeddings, look_tokens: int
    ) -> dict[Words, Caption]:
        """Refined once, for all steps of all images. look_tokens: of references, beside each."""
        seen = {words: image.references for image in images for words in all_words(image.request)}
        tokens = {prompt: len(embeddings[prompt]) for words in seen for prompt in words.prompts}
        batches = batched(seen, lambda words: padded(words.length(tokens)) + look_tokens)
        hardware, model, refined = weights.hardware, cast(Any, _model(weights)), list[Caption]()
        with weights.prelude(len(batches)) as stream:
            for batch in batches:
                given = [told(words, embeddings, seen[words], hardware) for words in batch]
                refined += model.refine_captions(given, stream)
        found = [caption.tokens for caption in refined]
        require_finite(found, self.model.transformer, "the refined prompt", hardware.dtype)
        return dict(zip(seen, refined, strict=True))

    def _explain(self, batch: Batch, error: NotFiniteError, weights: Weights) -> None:
        """Raise UserError saying where values stop being finite."""
        for checkpoint in (self.model.transformer, *(net.checkpoint for net in batch.controls.nets)):
            raise_if_damaged(checkpoint)
        where = f"step {error.step + 1} of {len(batch.schedule)}"
        dtype = weights.hardware.dtype
        watch = raise_at_first_non_finite(where, dtype)
        with _passes(weights, [batch.controls.runs(error.step, len(batch.schedule))] * len(batch.tiles)) as stream:
            batch.velocities(_model(weights), error.given, error.step, dtype, stream, watch)
        raise overflow(f"{where}: the latent has", dtype)  # of finite parts


def _model(weights: Weights) -> Transformer:
    return cast(Transformer, weights.component.model)


def _passes(weights: Weights, controlled: Sequence[bool]) -> AbstractContextManager[Stream]:
    """controlled: of each pass, whether the blocks of ControlNets run in it."""
    beside = frozenset(name for name in weights.component.blocks if name.startswith(f"{CONTROLS}."))
    idle = [frozenset[str]() if asked else beside for asked in controlled]
    return weights.passes(len(controlled), idle)
