"""Second phase: noise -> latents, over a number of steps.

What is drawn differently joins here: what images start from is `Batch.start`, the rule of a step is `Batch.denoised`'s
last line, a caller sees each step in `Denoise.run`, and whatever streams beside the transformer is opened where it is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import cast

from torch import Tensor
from zimage_kernels import Backend

from ..adapters.joined import AdapterSet
from ..checkpoint.model_files import ModelFiles
from ..config import GenerateOptions
from ..memory.hardware import Hardware
from ..memory.plan import Plan
from ..model.compute import Compute
from ..model.linear import release
from ..model.transformer import Caption, Transformer
from ..plan.job import Job, batched, padded
from ..plan.model_sizes import Model
from ..plan.prediction import ways_to_denoise
from .finite import overflow, raise_at_first_non_finite, raise_if_damaged, require_finite
from .steps import Batch, NotFiniteError, Schedule, schedule, texts
from .weights import Component, Weights
from .workspace import Count, WaysOn, Workspace

BLOCKS = ("context_refiner", "noise_refiner", "layers")  # come and go


class Denoise:
    """compute: what the transformer computes with; projecting: what multiplies by the narrow halves of adapters."""

    def __init__(
        self, model: ModelFiles, sizes: Model, compute: Compute, work: Workspace, projecting: Backend | None = None
    ) -> None:
        self.model, self.sizes, self.compute, self.work = model, sizes, compute, work
        self.projecting = projecting

    @cached_property
    def component(self) -> Component:
        skeleton = Transformer(self.model.transformer.config, self.compute)
        reencoded = self.compute.backend if self.compute.int8 else None
        return Component(skeleton, self.model.transformer, BLOCKS, reencoded, projecting=self.projecting)

    @property
    def transformer(self) -> Transformer:
        return cast(Transformer, self.component.model)

    def ways(self, job: Job) -> WaysOn:
        """What there is to plan."""
        return partial(ways_to_denoise, self.sizes, job)

    def with_adapters(self, adapters: AdapterSet) -> Component:
        """The transformer and what is added to it."""
        return replace(self.component, adapters=adapters) if adapters else self.component

    def schedule(self, request: GenerateOptions, adapters: AdapterSet, done: int, plan: Plan) -> Iterator[Schedule]:
        """What all images of a group share: of the same steps, shift and adapters. One, to be run as a phase is."""
        assert request.shift is not None
        component, hardware = self.with_adapters(adapters), self.work.hardware_of(plan)
        with self.work.meter.phase("denoise"):
            found = schedule(component, request.step_count, request.shift, hardware)
        yield found

    def run(
        self, requests: Sequence[GenerateOptions], embeddings: Mapping[str, Tensor], times: Schedule,
        adapters: AdapterSet, count: Count, done: int, plan: Plan,
    ) -> Iterator[Tensor]:  # fmt: skip
        """-> latents [channels, height/8, width/8] float32 on the CPU, of requests[done:]. count: of steps."""
        hardware, todo, failed = self.work.hardware_of(plan), requests[done:], None
        with self.work.open(self.with_adapters(adapters), plan) as weights:
            captions = self._captions(weights, todo, embeddings, hardware)
            batches = [Batch(todo[i : i + plan.way], captions, times) for i in range(0, len(todo), plan.way)]
            with weights.passes(len(batches) * len(times)) as stream:
                for batch in batches:
                    latents, start = list[Tensor](), time.perf_counter()
                    try:
                        for latents in batch.denoised(self.transformer, hardware, stream):
                            count.add(len(latents))
                            start, before = time.perf_counter(), start
                            self.work.meter.step_seconds.append(round(start - before, 4))
                    except NotFiniteError as error:
                        failed = batch, error.with_traceback(None)
                        break
                    yield from (latent.cpu() for latent in latents)
            if failed:
                self._explain(*failed, weights, hardware)

    def release(self) -> None:
        if "component" in vars(self):  # else it was never made
            release(self.component.model)

    def _captions(
        self, weights: Weights, requests: Sequence[GenerateOptions], embeddings: Mapping[str, Tensor],
        hardware: Hardware,
    ) -> dict[str, Caption]:  # fmt: skip
        """Refined once, for all steps of all images."""
        prompts = list(dict.fromkeys(text for request in requests for text in texts(request)))
        batches, refined = batched(prompts, lambda text: padded(len(embeddings[text]))), list[Caption]()
        with weights.prelude(len(batches)) as stream:
            for batch in batches:
                told = [embeddings[text].to(hardware.device) for text in batch]
                refined += self.transformer.refine_captions(told, stream)
        tokens = [caption.tokens for caption in refined]
        require_finite(tokens, self.model.transformer, "the refined prompt", hardware.dtype)
        return dict(zip(prompts, refined, strict=True))

    def _explain(self, batch: Batch, error: NotFiniteError, weights: Weights, hardware: Hardware) -> None:
        """Raise UserError saying where values stop being finite."""
        raise_if_damaged(self.model.transformer)
        where = f"step {error.step + 1} of {len(batch.schedule)}"
        watch = raise_at_first_non_finite(where, hardware.dtype)
        with weights.passes(1) as stream:
            batch.velocities(self.transformer, error.latents, error.step, hardware.dtype, stream, watch)
        raise overflow(f"{where}: the latent has", hardware.dtype)  # of finite parts
