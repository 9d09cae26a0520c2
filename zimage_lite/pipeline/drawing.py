"""Prompt to image, as a recipe: encode, denoise, decode. The only place where the phases meet.

Each phase opens its model, uses the whole budget, and closes it again; all are planned before the first one starts.
Images that are alike share a plan, and are denoised and decoded in rounds, so that finished ones are handed over as
they come.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from ..adapters.library import AdapterLibrary
from ..checkpoint.model_files import ModelFiles
from ..config import VAE_FACTOR, GenerateOptions, RuntimeOptions
from ..memory.failures import Clearing
from ..memory.hardware import Hardware, probe
from ..memory.meter import Meter
from ..memory.plan import Plan
from ..plan.job import Job
from ..plan.model_sizes import model_of
from ..plan.retry import Tell, Ways
from .advice import advice
from .backends import choose_for
from .decode import Decode
from .denoise import Denoise
from .encode import Encode
from .grouping import Group, grouped, rounds
from .picture import EncodePictures
from .steps import texts
from .workspace import Count, Progress, Workspace, silent


@dataclass(frozen=True)
class Drawing:
    """All that is to be done, planned. prompts: those that are to be encoded; kept: the embeddings of the others."""

    groups: Sequence[tuple[Group, Ways, Ways]]  # with the plans to denoise and to decode
    prompts: Sequence[str]
    encode: Ways | None
    kept: dict[str, Tensor]


@dataclass
class Pipeline:
    """Holds no weights between calls, only open headers. `meter` and `plans` tell what the last call used.

    tell: takes a line for the user: what else runs than they might expect, or that memory ran out and less is used.
    advises: whether it also takes what of requests is not followed or probably meant otherwise.
    """

    model: ModelFiles
    options: RuntimeOptions = field(default_factory=RuntimeOptions)
    tell: Tell = silent
    advises: bool = True

    def __post_init__(self) -> None:
        hardware, self.sizes = probe(self.options.device, self.options.dtype), model_of(self.model)
        self.choice = choose_for(self.model, self.sizes, self.options, hardware.device, self.tell)
        self.work = Workspace(hardware, self.options, self.tell, int8=self.choice.compute.int8)
        if self.choice.note:
            self.tell(self.choice.note)
        self.encoding = Encode(self.model, self.sizes, self.choice.unpacking, self.work)
        self.denoising = Denoise(self.model, self.sizes, self.choice.compute, self.work, self.choice.projecting)
        self.decoding = Decode(self.model, self.sizes, self.work)
        self.encoding_pictures = EncodePictures(self.model, self.sizes, self.work)
        self.adapters = AdapterLibrary(self.model.transformer, self.tell)

    def generate(self, requests: Sequence[GenerateOptions], progress: Progress = silent) -> list[Tensor]:
        """-> one [height, width, 3] uint8 tensor per request, on the CPU. Raises UserError, BudgetError if it does not
        fit. progress(phase, done, total) is called as it goes."""
        with Clearing(self._release):  # an interrupt can come between `images` and what puts it in inference mode
            found = dict(self.images(requests, progress))
        return [found[index] for index in range(len(requests))]

    @torch.inference_mode()
    def images(self, requests: Sequence[GenerateOptions], progress: Progress = silent) -> Iterator[tuple[int, Tensor]]:
        """The same as they come, each with its place in `requests`: of those that are alike, one after another; of
        several sizes or schedules, one group after another."""
        with Clearing(self._release):
            if requests:
                yield from self._drawn([self.complete(request) for request in requests], progress)

    def _drawn(self, requests: Sequence[GenerateOptions], progress: Progress) -> Iterator[tuple[int, Tensor]]:
        todo, within = self._planned(requests), self.work.planning.within
        for line in advice(requests, self.model) if self.advises else ():
            self.tell(line)
        self.work.begin()
        embeddings = todo.kept
        if todo.encode:
            embeddings = {**embeddings, **self.encoding.embeddings(todo.prompts, todo.encode, progress)}
        steps = Count(progress, "denoise", sum(request.step_count for request in requests))
        images = Count(progress, "decode", len(requests))
        for group, denoise, decode in todo.groups:
            adapters = group.job.adapters
            (times,) = within(denoise, partial(self.denoising.schedule, group.requests[0], adapters))
            for places in rounds(group, denoise.plan):
                some = [group.requests[place] for place in places]
                latents = list(within(denoise, partial(self.denoising.run, some, embeddings, times, adapters, steps)))
                with closing(within(decode, partial(self.decoding.run, latents))) as decoded:
                    for place, image in zip(places, decoded, strict=True):
                        images.add()
                        yield group.indices[place], image

    def _planned(self, requests: Sequence[GenerateOptions]) -> Drawing:
        """Raises BudgetError."""
        told = [texts(request) for request in requests]
        tokens = self.encoding.tokens(dict.fromkeys(text for of in told for text in of))
        adapters = {request.loras: self.adapters.of(request.loras) for request in requests}
        groups, kept = grouped(requests, told, tokens, adapters), self.encoding.kept(tokens)
        prompts = [text for text in tokens if text not in kept]
        todo = [self.encoding.ways([tokens[text] for text in prompts])] if prompts else []
        for group in groups:
            todo += [self.denoising.ways(group.job), self.decoding.ways(group.job)]
        planned = self.work.planning.planned(todo)
        encode, others = planned[0] if prompts else None, planned[bool(prompts) :]
        return Drawing(list(zip(groups, others[::2], others[1::2], strict=True)), prompts, encode, kept)

    def require_fit(self, requests: Sequence[GenerateOptions]) -> None:
        """Raises BudgetError for what `images` could not draw now. Loads no weights."""
        self._planned([self.complete(request) for request in requests])

    def complete(self, request: GenerateOptions) -> GenerateOptions:
        """What was left open is what the model says of itself."""
        (width, height), scheduler = self.model.default_size, self.model.scheduler
        return replace(
            request,
            width=width if request.width is None else request.width,
            height=height if request.height is None else request.height,
            steps=scheduler.steps if request.steps is None else request.steps,
            guidance=scheduler.guidance if request.guidance is None else request.guidance,
            shift=scheduler.shift if request.shift is None else request.shift,
        )

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str], progress: Progress = silent) -> list[Tensor]:
        """-> the embedding of each: [tokens, width] on the CPU, in the dtype of the residual stream. Kept ones are not
        computed again."""
        found = self.encoding.kept(prompts)
        unknown = [text for text in dict.fromkeys(prompts) if text not in found]
        with Clearing(self._release):
            tokens = self.encoding.tokens(unknown)
            ways = self.work.planning.planned([self.encoding.ways(list(tokens.values()))] if unknown else [])
            self.work.begin()
            for way in ways:
                found |= self.encoding.embeddings(unknown, way, progress)
        return [found[text] for text in prompts]

    @torch.inference_mode()
    def decode(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """latents: of one size. -> images [height, width, 3] uint8, on the CPU."""
        height, width = latents[0].shape[1:]
        job = Job(width * VAE_FACTOR, height * VAE_FACTOR, images=len(latents))
        with Clearing(self._release):
            (ways,) = self.work.planning.planned([self.decoding.ways(job)])
            self.work.begin()
            return list(self.work.planning.within(ways, partial(self.decoding.run, latents)))

    @torch.inference_mode()
    def encode_pictures(self, pictures: Sequence[Tensor]) -> list[Tensor]:
        """pictures: [height, width, 3] uint8, of one size, a multiple of 8. -> latents [16, height / 8, width / 8]
        float32, on the CPU: the most likely ones, that `decode` takes."""
        height, width = pictures[0].shape[:2]
        job = Job(width, height, pictures=len(pictures))
        with Clearing(self._release):
            (ways,) = self.work.planning.planned([self.encoding_pictures.ways(job)])
            self.work.begin()
            means = [None] * len(pictures)
            return list(self.work.planning.within(ways, partial(self.encoding_pictures.run, pictures, means)))

    @property
    def hardware(self) -> Hardware:
        return self.work.hardware

    @property
    def meter(self) -> Meter:
        return self.work.meter

    @property
    def plans(self) -> dict[str, Plan]:
        return self.work.plans

    def computes_with(self) -> dict[str, str]:
        """As plain data, by the names of the options."""
        device, dtype = str(self.hardware.device), self.hardware.dtype_name
        return {"device": device, "dtype": dtype, "backend": self.choice.backend, "compute": self.choice.bits}

    def _release(self) -> None:
        for phase in (self.encoding_pictures, self.encoding, self.denoising, self.decoding):
            phase.release()
        self.work.give_back()
