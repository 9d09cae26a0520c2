"""The steps of a training: what is made of pictures and captions first, then gradients and the optimizer.

Phases come one after another, as in drawing, each with all the memory: captions are encoded, pictures too, captions
refined; from then on there is only the transformer. All is planned before the first of them.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from ..config import Lora, TrainOptions
from ..errors import UserError
from ..memory.hardware import Hardware
from ..memory.heap import give_back
from ..memory.plan import Plan
from ..model.linear import release
from ..model.transformer import Caption, Modulation, Transformer
from ..pipeline.denoise import BLOCKS
from ..pipeline.drawing import Pipeline
from ..pipeline.steps import schedule
from ..pipeline.weights import Component
from ..pipeline.workspace import Progress, Workspace, silent
from ..plan.job import batched, padded
from ..plan.training import PRESERVED_SHARE, STEPS_AT_ONCE, TrainJob, ways_to_train
from .dataset import Example
from .draws import Draws
from .lora import TrainedLora
from .optimizer import Optimizer, optimizer_for, require_optimizer
from .passes import Batch, gradients

LONGEST_GRADIENT = 1.0
_PICTURES_AT_ONCE = 16


@dataclass
class Trainer:
    """preserved: so many of the examples, the last, are not new. Raises BudgetError where it is made, before anything
    is read. lora, optimizer: from `begin` on."""

    pipeline: Pipeline
    examples: Sequence[Example]
    options: TrainOptions
    assistant: tuple[Lora, ...] = ()
    preserved: int = 0
    lora: TrainedLora = field(init=False)
    optimizer: Optimizer = field(init=False)
    _latents: list[Tensor] = field(init=False, default_factory=list)  # of each example, on the CPU
    _captions: dict[str, Caption] = field(init=False, default_factory=dict)  # text -> refined, on the CPU
    _times: tuple[int, list[Modulation]] = field(init=False, default=(-1, []))  # of STEPS_AT_ONCE steps, on the CPU

    def __post_init__(self) -> None:
        pipeline, options = self.pipeline, self.options
        require_optimizer(options.optimizer)
        self.work = Workspace(hardware_for(pipeline.hardware), pipeline.options, pipeline.tell)
        pipeline.sizes.require_trainable()
        transformer, adapters = pipeline.model.transformer, pipeline.adapters.of(self.assistant)
        self.component = Component(Transformer(transformer.config), transformer, BLOCKS, adapters=adapters)
        tokens = pipeline.encoding.tokens(example.caption for example in self.examples)
        self.job = TrainJob(
            options.resolution, options.rank, options.batch, options.optimizer, tuple(tokens.values()),
            len(self.examples), options.steps, PRESERVED_SHARE if self.preserved else 0.0, adapters,
        )  # fmt: skip
        self._plan()
        self.draws = Draws(options, len(self.examples) - self.preserved, self.preserved)

    @property
    def model(self) -> Transformer:
        return cast(Transformer, self.component.model)

    @property
    def hardware(self) -> Hardware:
        return self.work.hardware_of(self.ways.plan)

    def prepare(self, progress: Progress = silent) -> None:
        """What takes the text encoder and the VAE, once."""
        texts = list(dict.fromkeys(example.caption for example in self.examples))
        # Clones, for what was computed in inference mode cannot be part of a graph.
        embeddings = [embedding.clone() for embedding in self.pipeline.encode(texts, progress)]
        self._latents = self._encoded(progress)
        refined = self.work.planning.within(self.ways, partial(self._refined, embeddings))
        self._captions = dict(zip(texts, refined, strict=True))
        self.job = replace(self.job, prepared=True)
        self._plan()  # beside what encoding has left in the process

    def _plan(self) -> None:
        give_back(0)
        (self.ways,) = self.work.planning.planned([partial(ways_to_train, self.pipeline.sizes, self.job)])

    def begin(self) -> None:
        """Untrained."""
        self.lora = TrainedLora(self.model, self.options.rank, self.options.seed, self.hardware.device)
        self.optimizer = optimizer_for(self.options, self.lora.parameters)

    def put_away(self) -> None:
        """Give back what `begin` made, for something else to have its memory."""
        del self.lora, self.optimizer
        self.work.give_back()

    def steps(self, first: int, last: int) -> Generator[float, None, None]:
        """Of each step its loss, once it is done. To the next multiple of STEPS_AT_ONCE at most. If memory runs out,
        the step that failed is done again with less, once."""
        return self.work.planning.within(self.ways, partial(self._run, first, last, self._vectors(first)))

    def _run(self, first: int, last: int, times: list[Modulation], done: int, plan: Plan) -> Iterator[float]:
        steps = range(first + done, last)
        refiners = frozenset(name for name in self.component.blocks if not name.startswith("layers."))
        idle = [frozenset[str](), refiners] * len(steps)
        with (
            self.work.open(self.component, plan) as weights,
            weights.passes(len(idle), idle, turning=True) as stream,
        ):
            for step in steps:
                batch = self._batch(step, times)
                self.optimizer.zero_grad(set_to_none=False)
                loss = gradients(self.model, self.lora, batch, self.hardware.dtype, stream)
                if not math.isfinite(loss):
                    raise UserError(f"step {step + 1}: the loss is {loss}", fix="use a smaller --rate")
                torch.nn.utils.clip_grad_norm_(self.lora.parameters, LONGEST_GRADIENT, foreach=False)
                for group in self.optimizer.param_groups:
                    group["lr"] = self.options.rate_at(step)
                self.optimizer.step()
                yield loss

    def _batch(self, step: int, times: list[Modulation]) -> Batch:
        device, chosen = self.hardware.device, self.draws.chosen(step)
        latents = [self._latents[place] for place in chosen]
        captions = [self._captions[self.examples[place].caption] for place in chosen]
        start = step % STEPS_AT_ONCE * self.options.batch
        return Batch(
            [latent.to(device) for latent in latents],
            [noise.to(device) for noise in self.draws.noises(step, latents)],
            self.draws.sigmas(step),
            [_on(device, caption) for caption in captions],
            [own.to(device) for own in times[start : start + self.options.batch]],
            sum(place >= self.draws.pictures for place in chosen),
            self.options.preserve_weight,
        )

    def _vectors(self, step: int) -> list[Modulation]:
        """Of all pictures of the steps around it, always of the same ones together: so they are the same to the bit
        wherever a training is taken up."""
        number = step // STEPS_AT_ONCE
        if self._times[0] != number:
            all_steps = range(number * STEPS_AT_ONCE, (number + 1) * STEPS_AT_ONCE)
            sigmas = [sigma for one in all_steps for sigma in self.draws.sigmas(one)]
            there = Hardware(torch.device("cpu"), self.hardware.dtype)
            with torch.no_grad():
                found = schedule(self.component, torch.tensor([*sigmas, 0.0]), there)
            self._times = number, list(found.modulations)
        return self._times[1]

    def _encoded(self, progress: Progress) -> list[Tensor]:
        """The pictures as latents: those of one size together, some at a time."""
        found, waiting = dict[int, Tensor](), dict[tuple[int, ...], dict[int, Tensor]]()

        def encode(some: dict[int, Tensor]) -> None:
            latents = self.pipeline.encode_pictures(list(some.values()))
            found.update({place: latent.clone() for place, latent in zip(some, latents, strict=True)})
            progress("pictures", len(found), len(self.examples))
            some.clear()

        for place, example in enumerate(self.examples):
            pixels = torch.from_numpy(example.pixels(self.options.resolution))
            alike = waiting.setdefault(tuple(pixels.shape), {})
            alike[place] = pixels
            if len(alike) == _PICTURES_AT_ONCE:
                encode(alike)
        for alike in waiting.values():
            if alike:
                encode(alike)
        return [found[place] for place in range(len(self.examples))]

    def _refined(self, embeddings: Sequence[Tensor], done: int, plan: Plan) -> Iterator[Caption]:
        batches = batched(embeddings[done:], lambda embedding: padded(len(embedding)))
        device, cpu = self.hardware.device, torch.device("cpu")
        with self.work.open(self.component, plan) as weights, weights.prelude(len(batches)) as stream:
            for batch in batches:
                with torch.no_grad():
                    captions = self.model.refine_captions([embedding.to(device) for embedding in batch], stream)
                yield from (_on(cpu, caption) for caption in captions)

    def release(self) -> None:
        release(self.component.model)


def hardware_for(drawing: Hardware) -> Hardware:
    """Where pictures are drawn in float16, gradients take float32: many are below what float16 holds."""
    return Hardware(drawing.device, torch.float32) if drawing.dtype == torch.float16 else drawing


def _on(device: torch.device, caption: Caption) -> Caption:
    cos, sin = caption.rope
    return Caption(caption.tokens.to(device), (cos.to(device), sin.to(device)))
