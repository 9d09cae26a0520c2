"""Prompt to image in three phases. Each one opens its model, uses the whole budget, and closes it again.

encode: prompts -> embeddings     denoise: noise -> latents, 8 steps     decode: latents -> pixels

All phases are planned before the first one starts. Images that are alike share a plan, and are denoised and decoded in
rounds, so that finished ones are handed over as they come.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import cast

import torch
from torch import Tensor, nn

from ..checkpoint.model_files import ModelFiles
from ..config import VAE_FACTOR, GenerateOptions, RuntimeOptions
from ..memory.failures import Clearing
from ..memory.hardware import Hardware, probe
from ..memory.machine import Machine
from ..memory.meter import Meter
from ..memory.plan import Phase, Plan
from ..memory.plan_vae import VaePlan
from ..model.banded import Banded
from ..model.float16 import stream_dtype
from ..model.linear import release
from ..model.text_encoder import TextEncoder
from ..model.transformer import Caption, Transformer, is_time_weight
from ..model.vae import Decoder, to_pixels
from ..plan.footprint import by_block
from ..plan.job import Job, batched, padded
from ..plan.model_sizes import Model, model_of
from ..plan.prediction import ways_to_decode, ways_to_denoise, ways_to_encode
from ..plan.retry import Planning, Tell, Ways
from .backends import Choice, choose
from .finite import overflow, raise_at_first_non_finite, raise_if_damaged, require_finite
from .grouping import Group, grouped, rounds
from .prompt_cache import PromptCache, cache_folder, embedding_key
from .steps import Batch, NotFiniteError, Schedule, schedule, texts
from .weights import Component, Weights, opened, read_into

Progress = Callable[[str, int, int], None]  # phase, done, total
WaysOn = Callable[[Machine], Sequence[Phase]]


def silent(*_: object) -> None:
    """No progress display, no notes."""


@dataclass
class Pipeline:
    """Holds no weights between calls, only open headers. `meter` and `plans` tell what the last call used.

    tell: takes a line for the user: what else runs than they might expect, or that memory ran out and less is used.
    """

    model: ModelFiles
    options: RuntimeOptions = field(default_factory=RuntimeOptions)
    tell: Tell = silent
    meter: Meter = field(default_factory=Meter)
    plans: dict[str, Plan] = field(default_factory=dict)  # by phase; of several, the one that takes the most

    def __post_init__(self) -> None:
        self.hardware = probe(self.options.device, self.options.dtype)
        self.choice = self._choice()
        if self.choice.note:
            self.tell(self.choice.note)
        self.cache = PromptCache(cache_folder() if self.options.cache else None)

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
            yield from self._drawn(requests, progress)

    def _drawn(self, requests: Sequence[GenerateOptions], progress: Progress) -> Iterator[tuple[int, Tensor]]:
        if not requests:
            return
        requests = [self.complete(request) for request in requests]
        groups, kept, unknown, planned = self._planned(requests)
        encode, others = planned[: bool(unknown)], planned[bool(unknown) :]
        self._begin()
        embeddings = {**kept, **self._embeddings(unknown, encode, progress)}
        steps, images = (
            _Count(progress, "denoise", sum(r.steps for r in requests)),
            _Count(progress, "decode", len(requests)),
        )
        for group, denoise, decode in zip(groups, others[::2], others[1::2], strict=True):
            (times,) = self.planning.within(denoise, partial(self._schedule, group.requests[0]))
            for places in rounds(group, denoise.plan):
                some = [group.requests[place] for place in places]
                latents = list(self.planning.within(denoise, partial(self._denoise, some, embeddings, times, steps)))
                with closing(self.planning.within(decode, partial(self._decode, latents))) as decoded:
                    for place, image in zip(places, decoded, strict=True):
                        images.add()
                        yield group.indices[place], image

    def _planned(
        self, requests: Sequence[GenerateOptions]
    ) -> tuple[list[Group], dict[str, Tensor], list[str], list[Ways]]:
        """-> images that are alike, the embeddings that are kept, the prompts that are to be encoded, and the plans: of
        those, if there are any, then of each group two. Raises BudgetError."""
        told = [texts(request) for request in requests]
        prompts = list(dict.fromkeys(text for of in told for text in of))
        tokens = {text: len(self.model.tokenizer.encode(text)) for text in prompts}
        groups, kept = grouped(requests, told, tokens), self._kept(prompts)
        unknown = [text for text in prompts if text not in kept]
        encode = [self._encoding([tokens[text] for text in unknown])] if unknown else []
        drawing = [way for group in groups for way in (self._denoising(group.job), self._decoding(group.job))]
        return groups, kept, unknown, self.planning.planned([*encode, *drawing])

    def require_fit(self, requests: Sequence[GenerateOptions]) -> None:
        """Raises BudgetError for what `images` could not draw now. Loads no weights."""
        self._planned([self.complete(request) for request in requests])

    def computes_with(self) -> dict[str, str]:
        """As plain data, by the names of the options."""
        device, dtype = str(self.hardware.device), self.hardware.dtype_name
        return {"device": device, "dtype": dtype, "backend": self.choice.backend, "compute": self.choice.bits}

    def complete(self, request: GenerateOptions) -> GenerateOptions:
        """What was left open is what the model says of itself."""
        width, height = self.model.default_size
        return replace(
            request,
            width=width if request.width is None else request.width,
            height=height if request.height is None else request.height,
            shift=self.model.scheduler.shift if request.shift is None else request.shift,
        )

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str], progress: Progress = silent) -> list[Tensor]:
        """-> the embedding of each: [tokens, width] on the CPU, in the dtype of the residual stream. Kept ones are not
        computed again."""
        found = self._kept(prompts)
        unknown = [text for text in dict.fromkeys(prompts) if text not in found]
        with Clearing(self._release):
            tokens = [len(self.model.tokenizer.encode(text)) for text in unknown]
            ways = self.planning.planned([self._encoding(tokens)] if unknown else [])
            self._begin()
            found |= self._embeddings(unknown, ways, progress)
        return [found[text] for text in prompts]

    @torch.inference_mode()
    def decode(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """latents: of one size. -> images [height, width, 3] uint8, on the CPU."""
        height, width = latents[0].shape[1:]
        job = Job(width * VAE_FACTOR, height * VAE_FACTOR, images=len(latents))
        with Clearing(self._release):
            (ways,) = self.planning.planned([self._decoding(job)])
            self._begin()
            return list(self.planning.within(ways, partial(self._decode, latents)))

    @cached_property
    def transformer(self) -> Component:
        blocks = ("context_refiner", "noise_refiner", "layers")
        compute = self.choice.compute
        skeleton = Transformer(self.model.transformer.config, compute)
        return Component(
            skeleton, self.model.transformer, blocks, reencoded=compute.int8 and compute.backend == "triton"
        )

    def _choice(self) -> Choice:
        parts, config = self.sizes.transformer, self.model.transformer.config
        of_blocks, _ = by_block(part for part in parts if part.rows > 1 and not is_time_weight(part.name))
        formats = {part.format for block in of_blocks.values() for part in block}
        return choose(self.options, self.hardware.device, config.head_dim, formats, self.tell)

    @cached_property
    def text_encoder(self) -> Component:
        skeleton = TextEncoder(self.model.text_encoder.config, self.choice.unpacking)
        return Component(skeleton, self.model.text_encoder, ("layers",))

    @cached_property
    def decoder(self) -> Component:
        return Component(nn.ModuleDict({"decoder": Decoder(self.model.vae.config)}), self.model.vae, ())

    @cached_property
    def sizes(self) -> Model:
        return model_of(self.model)

    @property
    def planning(self) -> Planning:
        return Planning(self.hardware, self.options, self.tell)

    def _encoding(self, tokens: Sequence[int]) -> WaysOn:
        return partial(ways_to_encode, self.sizes, tokens)

    def _denoising(self, job: Job) -> WaysOn:
        return partial(ways_to_denoise, self.sizes, job)

    def _decoding(self, job: Job) -> WaysOn:
        return partial(ways_to_decode, self.sizes, job)

    def _kept(self, prompts: Iterable[str]) -> dict[str, Tensor]:
        """The embeddings that are on the disk."""
        found = {text: self.cache.get(self._key(text)) for text in prompts}
        return {text: embedding for text, embedding in found.items() if embedding is not None}

    def _key(self, text: str) -> str:
        return embedding_key(self.model.tokenizer.encode(text), self.model.text_encoder, self.hardware.dtype)

    def _embeddings(self, prompts: Sequence[str], ways: Sequence[Ways], progress: Progress) -> dict[str, Tensor]:
        """Computed, and kept for the next time. ways: none if there are no prompts."""
        if not prompts:
            return {}
        encoded = self.planning.within(ways[0], partial(self._encode, prompts, progress))
        found = dict(zip(prompts, encoded, strict=True))
        self.model.text_encoder.require_unchanged()  # else they would be kept for other weights
        for text, embedding in found.items():
            self.cache.put(self._key(text), embedding)
        return found

    def _encode(self, prompts: Sequence[str], progress: Progress, done: int, plan: Plan) -> Iterator[Tensor]:
        hardware, component = self._hardware(plan), self.text_encoder
        table = self.model.text_encoder.tensors["embed_tokens.weight"]
        batches = batched([self.model.tokenizer.encode(text) for text in prompts[done:]], len)
        kept = stream_dtype(self.hardware.dtype)  # also where the CPU encodes in float32 for the GPU
        with self._open(component, plan) as weights, weights.passes(len(batches)) as stream:
            for batch in batches:
                rows = table.gather([row for prompt in batch for row in prompt]).to(hardware.device, hardware.dtype)
                embeddings = component.model(rows, [len(prompt) for prompt in batch], stream)
                require_finite(embeddings, component.checkpoint, "the prompt's embedding", hardware.dtype)
                done += len(batch)
                progress("encode", done, len(prompts))
                yield from (embedding.to("cpu", kept) for embedding in embeddings)

    def _schedule(self, request: GenerateOptions, done: int, plan: Plan) -> Iterator[Schedule]:
        assert request.shift is not None
        with self.meter.phase("denoise"):
            found = schedule(self.transformer, request.steps, request.shift, self._hardware(plan))
        yield found

    def _denoise(
        self, requests: Sequence[GenerateOptions], embeddings: Mapping[str, Tensor], times: Schedule, count: _Count,
        done: int, plan: Plan,
    ) -> Iterator[Tensor]:  # fmt: skip
        """-> latents [channels, height/8, width/8] float32 on the CPU, of requests[done:]."""
        hardware, model = self._hardware(plan), cast(Transformer, self.transformer.model)
        todo = requests[done:]
        with self._open(self.transformer, plan) as weights:
            captions = self._captions(weights, todo, embeddings, hardware)
            batches = [Batch(todo[i : i + plan.way], captions, times) for i in range(0, len(todo), plan.way)]
            failed = None
            with weights.passes(len(batches) * len(times)) as stream:
                for batch in batches:
                    latents, start = list[Tensor](), time.perf_counter()
                    try:
                        for latents in batch.denoised(model, hardware, stream):
                            count.add(len(latents))
                            start, before = time.perf_counter(), start
                            self.meter.step_seconds.append(round(start - before, 4))
                    except NotFiniteError as error:
                        failed = batch, error.with_traceback(None)
                        break
                    yield from (latent.cpu() for latent in latents)
            if failed:
                self._explain(*failed, weights, hardware)

    def _explain(self, batch: Batch, error: NotFiniteError, weights: Weights, hardware: Hardware) -> None:
        """Raise UserError saying where values stop being finite."""
        raise_if_damaged(self.model.transformer)
        where = f"step {error.step + 1} of {len(batch.schedule)}"
        watch = raise_at_first_non_finite(where, hardware.dtype)
        with weights.passes(1) as stream:
            batch.step(
                cast(Transformer, self.transformer.model), error.latents, error.step, hardware.dtype, stream, watch
            )
        raise overflow(f"{where}: the latent has", hardware.dtype)  # of finite parts

    def _captions(
        self,
        weights: Weights,
        requests: Sequence[GenerateOptions],
        embeddings: Mapping[str, Tensor],
        hardware: Hardware,
    ) -> dict[str, Caption]:
        prompts = list(dict.fromkeys(text for request in requests for text in texts(request)))
        batches, refined = batched(prompts, lambda text: padded(len(embeddings[text]))), list[Caption]()
        with weights.prelude(len(batches)) as stream:
            for batch in batches:
                told = [embeddings[text].to(hardware.device) for text in batch]
                refined += cast(Transformer, self.transformer.model).refine_captions(told, stream)
        tokens = [caption.tokens for caption in refined]
        require_finite(tokens, self.model.transformer, "the refined prompt", hardware.dtype)
        return dict(zip(prompts, refined, strict=True))

    def _decode(self, latents: Sequence[Tensor], done: int, plan: Plan) -> Iterator[Tensor]:
        """-> images [height, width, 3] uint8 on the CPU, of latents[done:]."""
        hardware, model = self._hardware(plan), self.decoder.model
        decoder = cast(Decoder, model.get_submodule("decoder"))
        self._note(plan)
        try:
            with self.meter.phase("decode"):
                read_into(model, self.decoder.rest, hardware)
            for latent in latents[done:]:
                with self.meter.phase("decode"):
                    image = decode_as_planned(decoder, latent.to(hardware.device), plan.way)
                    require_finite([image], self.model.vae, "the decoded image", hardware.dtype)
                    pixels = to_pixels(image).cpu()
                    del image
                yield pixels
        finally:
            release(model)
            if hardware.device.type == "cuda":
                torch.cuda.empty_cache()

    def _begin(self) -> None:
        self.meter, self.plans = Meter(), {}

    def _note(self, plan: Plan) -> None:
        self.plans[plan.phase] = max(
            plan, self.plans.get(plan.phase, plan), key=lambda p: (p.peak_vram_bytes, p.peak_ram_bytes)
        )

    def _hardware(self, plan: Plan) -> Hardware:
        """The GPU's work may be done by the CPU beside it."""
        return self.hardware.on_cpu() if plan.device == "cpu" and self.hardware.device.type == "cuda" else self.hardware

    def _release(self) -> None:
        for name in ("transformer", "text_encoder", "decoder"):
            if name in vars(self):  # else it was never made
                release(getattr(self, name).model)
        if self.hardware.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def _open(self, component: Component, plan: Plan) -> Iterator[Weights]:
        """With the time and memory that it takes."""
        self._note(plan)
        with self.meter.phase(plan.phase):
            with opened(component, plan, self._hardware(plan)) as weights:
                yield weights
            for moved in weights.moved:
                self.meter.moved(plan.phase, moved)


@dataclass
class _Count:
    """Tells how far a phase is."""

    progress: Progress
    phase: str
    total: int
    done: int = 0

    def add(self, count: int = 1) -> None:
        self.done = min(self.done + count, self.total)  # after a second attempt some come twice
        self.progress(self.phase, self.done, self.total)


def decode_as_planned(decoder: Decoder, latent: Tensor, plan: VaePlan) -> Tensor:
    """-> image [3, height, width] in the compute dtype, on the device."""
    if not plan.rows_per_band:
        return cast(Tensor, decoder(latent))
    store = torch.device("cpu") if plan.spilled else None
    return Banded(plan.rows_per_band, plan.store_input, plan.store_hidden, store).decode(decoder, latent)
