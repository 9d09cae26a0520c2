"""Prompt to image, as a recipe: encode, denoise, decode. The only place where the phases meet.

A picture that an image is made from is encoded before the transformer is opened; a larger image is made from a smaller
one that is drawn first.

Each phase opens its model, uses the whole budget, and closes it again; all are planned before the first one starts.
Images that are alike share a plan, and are denoised and decoded in rounds, so that finished ones are handed over as
they come.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..adapters.library import AdapterLibrary
from ..checkpoint.model_files import ModelFiles
from ..config import VAE_FACTOR, GenerateOptions, RuntimeOptions, VisionConfig
from ..memory.failures import Clearing
from ..memory.hardware import Hardware, probe
from ..memory.meter import Meter
from ..memory.plan import Plan
from ..model.omni import Seen
from ..pictures.recipe import recipe
from ..plan.job import Job, reference_jobs
from ..plan.model_sizes import model_of
from ..plan.retry import Tell, Ways
from .advice import advice
from .backends import choose_for
from .controls import ControlLibrary, unusual
from .decode import Decode
from .denoise import Denoise, OnStep
from .encode import Encode, Prompt
from .grouping import Group, grouped, rounds
from .levels import as_tensor
from .look import Look
from .picture import EncodePictures
from .references import Reference, require_seeing
from .tasks import Task, tasks_of
from .walk import Image
from .words import prompts
from .workspace import Count, Progress, Workspace, silent

OnLatents = Callable[[int, Tensor], object]


@dataclass(frozen=True)
class Planned:
    """A group, and how its phases will be done. references: of those of each size, how they are encoded, and look: how
    the vision tower looks at all of them."""

    group: Group
    denoise: Ways
    decode: Ways
    picture: Ways | None
    look: Ways | None = None
    references: Mapping[tuple[int, int], Ways] = field(default_factory=dict)

    @property
    def ways(self) -> Iterator[Ways]:
        """In their order."""
        yield from filter(None, (self.picture, *self.references.values(), self.look, self.denoise, self.decode))


@dataclass(frozen=True)
class Drawing:
    """All that is to be done, planned. prompts: those that are to be encoded; kept: the embeddings of the others."""

    groups: Sequence[Planned]
    prompts: Sequence[Prompt]
    encode: Ways | None
    kept: Mapping[Any, Tensor]


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
        self.looking = Look(self.model, self.sizes, self.choice.unpacking, self.work)
        self.adapters = AdapterLibrary(self.model.transformer.config, self.tell, self.model.transformer.tensors)
        self.controls = ControlLibrary(self.model.transformer.config, self.tell)

    def generate(
        self, requests: Sequence[GenerateOptions], progress: Progress = silent, on_step: OnStep | None = None
    ) -> list[Tensor]:
        """-> one [height, width, 3] uint8 tensor per request, on the CPU. Raises UserError, BudgetError if it does not
        fit. progress(phase, done, total) is called as it goes, on_step after each step of each image: what it raises
        stops the run there, with all memory given back."""
        with Clearing(self.release):  # an interrupt can come between `images` and what puts it in inference mode
            found = dict(self.images(requests, progress, on_step))
        return [found[index] for index in range(len(requests))]

    @torch.inference_mode()
    def images(
        self, requests: Sequence[GenerateOptions], progress: Progress = silent, on_step: OnStep | None = None,
        on_latents: OnLatents | None = None,
    ) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
        """The same as they come, each with its place in `requests`: of those that are alike, one after another; of
        several sizes or schedules, one group after another. on_latents: called with each place and its latents before
        they are decoded, [channels, height/8, width/8] float32."""
        with Clearing(self.release):
            if completed := self._completed(requests):
                yield from self._drawn(completed, progress, on_step, on_latents)

    def _drawn(
        self, requests: Sequence[GenerateOptions], progress: Progress, on_step: OnStep | None,
        on_latents: OnLatents | None,
    ) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
        tasks, within = self._tasks(requests), self.work.planning.within
        notes = dict.fromkeys(note for task in tasks if task.sketch for note in task.sketch.notes)
        for task in tasks:
            notes |= dict.fromkeys(unusual(task.request, task.controls, task.steps, self.model.scheduler.undistilled))
        for line in (*advice(requests, self.model), *notes) if self.advises else ():
            self.tell(line)
        images = Count(progress, "decode", len(tasks))
        for planned, some, latents in self._denoised(tasks, progress, on_step):
            if on_latents:
                for task, latent in zip(some, latents, strict=True):
                    on_latents(task.place, latent)
            with closing(within(planned.decode, partial(self.decoding.run, latents))) as decoded:
                for task, image in zip(some, decoded, strict=True):
                    images.add()
                    finished = task.sketch.finished(image) if task.sketch else image
                    if task.enlarged and task.enlarged.sketch:
                        task.enlarged.sketch.made_from(finished)
                    else:
                        yield task.place, finished

    @torch.inference_mode()
    def denoised(
        self, requests: Sequence[GenerateOptions], progress: Progress = silent, on_step: OnStep | None = None
    ) -> Iterator[list[int]]:
        """What `images` does without decoding, for who watches the transformer: the places in `requests` of those that
        are done, some at a time, before any of the next is begun."""
        with Clearing(self.release):
            tasks = self._tasks(self._completed(requests))
            for _, some, _ in self._denoised(tasks, progress, on_step):
                yield [task.place for task in some]

    def _denoised(
        self, tasks: Sequence[Task], progress: Progress, on_step: OnStep | None
    ) -> Iterator[tuple[Planned, Sequence[Task], list[Tensor]]]:
        """In rounds, with their latents."""
        todo, within = self._planned(tasks), self.work.planning.within
        self.work.begin()
        embeddings = todo.kept
        if todo.encode:
            embeddings = {**embeddings, **self.encoding.embeddings(todo.prompts, todo.encode, progress)}
        steps = Count(progress, "denoise", sum(task.steps for task in tasks))
        for planned in todo.groups:
            job = planned.group.job
            sigmas = as_tensor(planned.group.tasks[0].sigmas)
            controls = planned.group.tasks[0].controls
            times = within(planned.denoise, partial(self.denoising.schedules, sigmas, job.adapters, controls))
            sets = dict(zip(planned.group.loras, zip(job.adapters, times, strict=True), strict=True))
            for some in rounds(planned.group, planned.denoise.plan):
                wanted = self._begun(some, planned)
                run = partial(self.denoising.run, wanted, embeddings, sets, job, controls, steps, on_step)
                yield planned, some, list(within(planned.denoise, run))

    def _begun(self, tasks: Sequence[Task], planned: Planned) -> list[Image]:
        """With the latents of the pictures that they are made from, and that ControlNets see, each encoded once."""
        wanted = {picture.key: picture for task in tasks for picture in task.pictures}
        found = {key: picture.latent for key, picture in wanted.items() if picture.latent is not None}
        if planned.picture:
            unknown = [picture for key, picture in wanted.items() if key not in found]
            pictures, noises = [picture.given() for picture in unknown], [picture.noise() for picture in unknown]
            run = partial(self.encoding_pictures.run, pictures, noises)
            latents = self.work.planning.within(planned.picture, run)
            found |= {picture.key: latent for picture, latent in zip(unknown, latents, strict=True)}
        sketches = {task.sketch.key: task.sketch for task in tasks if task.sketch}
        sights = {sight.key: sight for task in tasks for sight in task.sights}
        sources = {key: sketch.source(found[key]) for key, sketch in sketches.items()}
        contexts = {key: sight.context(found) for key, sight in sights.items()}
        seen = self._looked_at({one.key: one for task in tasks for one in task.references}, planned)
        return [task.begun(sources, contexts, seen) for task in tasks]

    def _looked_at(self, references: Mapping[Hashable, Reference], planned: Planned) -> dict[Hashable, Seen]:
        """What an Omni sees of them, each encoded once."""
        within, latents = self.work.planning.within, dict[Hashable, Tensor]()
        for size, ways in planned.references.items():
            some = [reference for reference in references.values() if reference.shape.size == size]
            run = partial(self.encoding_pictures.run, [reference.given() for reference in some], [None] * len(some))
            latents |= zip((reference.key for reference in some), within(ways, run), strict=True)
        if planned.look is None:
            return {}
        features = within(planned.look, partial(self.looking.run, list(references.values())))
        return {key: Seen(latents[key], own) for key, own in zip(references, features, strict=True)}

    def _tasks(self, requests: Sequence[GenerateOptions]) -> list[Task]:
        require_seeing(self.model, requests)
        channels, tower = self.model.transformer.config.in_channels, self.model.siglip
        patch = tower.config.patch_size if tower else VisionConfig.patch_size
        return tasks_of(requests, channels, self.model.default_size, self.controls.of, patch)

    def _planned(self, tasks: Sequence[Task]) -> Drawing:
        """Raises BudgetError."""
        requests = [task.request for task in tasks]
        tokens = self.encoding.tokens(dict.fromkeys(prompt for request in requests for prompt in prompts(request)))
        adapters = {request.loras: self.adapters.of(request.loras) for request in requests}
        groups, kept = grouped(tasks, tokens, adapters), self.encoding.kept(tokens)
        unknown = [prompt for prompt in tokens if prompt not in kept]
        todo = [self.encoding.ways([tokens[prompt] for prompt in unknown])] if unknown else []
        for group in groups:
            todo += [self.denoising.ways(group.job), self.decoding.ways(group.job)]
            todo += [self.encoding_pictures.ways(group.job)] if group.job.pictures else []
            todo += [self.looking.ways(group.job)] if group.job.references else []
            todo += [self.encoding_pictures.ways(job) for job in reference_jobs(group.job).values()]
        planned = iter(self.work.planning.planned(todo))
        encode = next(planned) if unknown else None
        ways = []
        for group in groups:
            first = group, next(planned), next(planned), next(planned) if group.job.pictures else None
            look = next(planned) if group.job.references else None
            ways.append(Planned(*first, look, {size: next(planned) for size in reference_jobs(group.job)}))
        return Drawing(ways, unknown, encode, kept)

    def planned(self, requests: Sequence[GenerateOptions]) -> list[Plan]:
        """How `images` would draw them now, in the order of its phases. Raises BudgetError for what does not fit.
        Loads no weights."""
        todo = self._planned(self._tasks(self._completed(requests)))
        ways = [todo.encode, *(way for one in todo.groups for way in one.ways)]
        return [way.plan for way in ways if way]

    def require_fit(self, requests: Sequence[GenerateOptions]) -> None:
        """Raises BudgetError for what `images` could not draw now. Loads no weights."""
        self.planned(requests)

    def complete(self, request: GenerateOptions) -> GenerateOptions:
        """What was left open is what the model says of itself."""
        return self.model.scheduler.completed(request, self.model.default_size)

    def _completed(self, requests: Sequence[GenerateOptions]) -> list[GenerateOptions]:
        """Raises TypeError for what are no requests."""
        if not isinstance(requests, Sequence) or not all(isinstance(one, GenerateOptions) for one in requests):
            raise TypeError(f"got {requests!r:.60}, expected a list of requests: [GenerateOptions('a red fox')]")
        return [self.complete(request) for request in requests]

    def recipe(
        self, request: GenerateOptions, pixels: Tensor | None = None, sha256: str | None = None
    ) -> dict[str, Any]:
        """What a picture says of itself; before it is drawn, without its size. pixels: [height, width, 3]; sha256: of
        the transformer's file, where it is one and known."""
        size = None if pixels is None else (pixels.shape[1], pixels.shape[0])
        return recipe(request, self.model, size, self.adapters.told(request.loras), self.controls.told(request), sha256)

    @torch.inference_mode()
    def encode(self, prompts: Sequence[Prompt], progress: Progress = silent) -> list[Tensor]:
        """-> the embedding of each: [tokens, width] on the CPU, in the dtype of the residual stream. Kept ones are not
        computed again."""
        found = self.encoding.kept(prompts)
        unknown = [text for text in dict.fromkeys(prompts) if text not in found]
        with Clearing(self.release):
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
        with Clearing(self.release):
            (ways,) = self.work.planning.planned([self.decoding.ways(job)])
            self.work.begin()
            return list(self.work.planning.within(ways, partial(self.decoding.run, latents)))

    @torch.inference_mode()
    def encode_pictures(self, pictures: Sequence[Tensor]) -> list[Tensor]:
        """pictures: [height, width, 3] uint8, of one size, a multiple of 8. -> latents [16, height / 8, width / 8]
        float32, on the CPU: the most likely ones, that `decode` takes."""
        height, width = pictures[0].shape[:2]
        job = Job(width, height, pictures=len(pictures))
        with Clearing(self.release):
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

    def release(self) -> None:
        """Let go of what an interrupted call may have left."""
        for phase in (self.encoding_pictures, self.looking, self.encoding, self.denoising, self.decoding):
            phase.release()
        self.work.give_back()
