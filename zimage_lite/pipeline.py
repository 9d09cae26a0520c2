"""Prompt to image in three phases. Each one opens its model, uses the whole budget, and closes it again.

encode: prompts -> embeddings     denoise: noise -> latents, 8 steps     decode: latents -> pixels

All phases are planned before the first one starts. Images that are alike share a plan, and are denoised and decoded in
rounds, so that finished ones are handed over as they come.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from .backends import Choice, choose
from .checkpoint.checkpoint import Checkpoint
from .checkpoint.model_files import ModelFiles
from .config import TOKENS_PER_PASS, VAE_FACTOR, GenerateOptions, RuntimeOptions
from .denoising import Batch, NotFiniteError, Schedule, overflow, raise_at_first_non_finite, schedule, texts
from .errors import BudgetError
from .failures import Clearing, forget, is_out_of_memory
from .footprint import by_block, of_time
from .grouping import grouped, rounds
from .loading import Component, Weights, opened, raise_if_damaged, read_into
from .memory.hardware import Hardware, machine_here, probe
from .memory.meter import Meter
from .memory.plan import Phase, Plan
from .memory.plan_vae import VaePlan
from .memory.planner import budgets_in_force, plan_phases
from .model.banded import Banded
from .model.linear import release
from .model.text_encoder import TextEncoder
from .model.transformer import Caption, Transformer
from .model.vae import Decoder, to_pixels
from .prediction import Job, Model, model_of, phases
from .prompt_cache import PromptCache, cache_folder, embedding_key
from .units import format_gb

LESS_AFTER_OOM = 0.85  # of what did not fit is planned for the second time, or less if less is free

Progress = Callable[[str, int, int], None]  # phase, done, total
Tell = Callable[[str], None]  # takes a line for the user
_Item = TypeVar("_Item")


def silent(*_: object) -> None:
    """No progress display, no notes."""


@dataclass
class Ways:
    """How a phase could be done, and how it will be."""

    phases: Sequence[Phase]
    plan: Plan


@dataclass
class Pipeline:
    """Holds no weights between calls, only open headers. `meter` and `plans` tell what the last call used."""

    model: ModelFiles
    options: RuntimeOptions = field(default_factory=RuntimeOptions)
    tell: Tell = silent
    meter: Meter = field(default_factory=Meter)
    plans: dict[str, Plan] = field(default_factory=dict)  # by phase; the last one of each

    def __post_init__(self) -> None:
        self.hardware = probe(self.options.device, self.options.dtype)
        self.choice = self._choice()
        if self.choice.note:
            self.tell(self.choice.note)
        self.cache = PromptCache(cache_folder() if self.options.cache else None)

    def generate(self, requests: Sequence[GenerateOptions], progress: Progress = silent) -> list[Tensor]:
        """-> one [height, width, 3] uint8 tensor per request, on the CPU. Raises UserError."""
        with Clearing(self._release):  # an interrupt can come between `images` and what puts it in inference mode
            found = dict(self.images(requests, progress))
        return [found[index] for index in range(len(requests))]

    @torch.inference_mode()
    def images(self, requests: Sequence[GenerateOptions], progress: Progress = silent) -> Iterator[tuple[int, Tensor]]:
        """The same as they come, each with its place in `requests`."""
        with Clearing(self._release):
            yield from self._drawn(requests, progress)

    def _drawn(self, requests: Sequence[GenerateOptions], progress: Progress) -> Iterator[tuple[int, Tensor]]:
        if not requests:
            return
        requests = [self.complete(request) for request in requests]
        told = [texts(request) for request in requests]
        prompts = list(dict.fromkeys(text for of in told for text in of))
        tokens = {text: len(self.model.tokenizer.encode(text)) for text in prompts}
        groups, kept = grouped(requests, told, tokens), self._kept(prompts)
        unknown = [text for text in prompts if text not in kept]
        encode, others = self._planned([tokens[text] for text in unknown], [group.job for group in groups])
        self.meter = Meter()
        self.plans.clear()
        embeddings = {**kept, **self._embeddings(unknown, encode, progress)}
        steps, images = (
            _Count(progress, "denoise", sum(r.steps for r in requests)),
            _Count(progress, "decode", len(requests)),
        )
        for group, denoise, decode in zip(groups, others[::2], others[1::2], strict=True):
            times = self._schedule(group.requests[0], denoise.plan)
            for places in rounds(group, denoise.plan):
                some = [group.requests[place] for place in places]
                latents = list(self._within(denoise, partial(self._denoise, some, embeddings, times, steps)))
                with closing(self._within(decode, partial(self._decode, latents))) as decoded:
                    for place, image in zip(places, decoded, strict=True):
                        images.add()
                        yield group.indices[place], image

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
            ways, _ = self._planned([len(self.model.tokenizer.encode(text)) for text in unknown], [])
            found |= self._embeddings(unknown, ways, progress)
        return [found[text] for text in prompts]

    @torch.inference_mode()
    def decode(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """latents: of one size. -> images [height, width, 3] uint8, on the CPU."""
        height, width = latents[0].shape[1:]
        job = Job(width * VAE_FACTOR, height * VAE_FACTOR, images=len(latents))
        with Clearing(self._release):
            _, (_, decode) = self._planned([], [job])
            return list(self._within(decode, partial(self._decode, latents)))

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
        of_blocks, _ = by_block(part for part in parts if part.rows > 1 and not of_time(part))
        formats = {part.format for block in of_blocks.values() for part in block}
        return choose(self.options, self.hardware.device, config.head_dim, formats)

    @cached_property
    def text_encoder(self) -> Component:
        return Component(TextEncoder(self.model.text_encoder.config), self.model.text_encoder, ("layers",))

    @cached_property
    def decoder(self) -> Component:
        return Component(nn.ModuleDict({"decoder": Decoder(self.model.vae.config)}), self.model.vae, ())

    @cached_property
    def sizes(self) -> Model:
        return model_of(self.model)

    def _planned(self, unknown: Sequence[int], jobs: Sequence[Job]) -> tuple[Ways | None, list[Ways]]:
        """unknown: tokens of each prompt that must be encoded. -> how to do that, and how each job is denoised and
        decoded, one after the other. Raises BudgetError."""
        machine = machine_here(self.hardware)
        budgets = budgets_in_force(machine, self.options.vram_bytes, self.options.ram_bytes)
        ways = [way for job in jobs for way in phases(self.sizes, job, machine)[1:]]
        if unknown:
            ways.insert(0, phases(self.sizes, Job(16, 16, prompt_tokens=tuple(unknown)), machine)[0])
        found = [Ways(way, plan) for way, plan in zip(ways, plan_phases(ways, machine, budgets), strict=True)]
        return (found[0], found[1:]) if unknown else (None, found)

    def _within(self, ways: Ways, run: Callable[[int, Plan], Iterator[_Item]]) -> Generator[_Item, None, None]:
        """What run(done, plan) yields from its item `done` on. If memory runs out in spite of the plan, because another
        program took it, plans again with less, once, and goes on where it was. Raises BudgetError."""
        done = 0
        for again in (True, False):
            try:
                for item in run(done, ways.plan):
                    done += 1
                    yield item
                return
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                forget(error)  # a reader's future may hold it
            if again:  # out of the handler: the error itself is gone
                ways.plan = self._planned_again(ways)
        raise _ran_out(f"twice, although {_peaks(ways.plan)} were planned", ways.plan)

    def _planned_again(self, ways: Ways) -> Plan:
        machine, old = machine_here(self.hardware), ways.plan
        limits = budgets_in_force(machine, self.options.vram_bytes, self.options.ram_bytes)
        if old.device == "gpu":
            limits = replace(limits, vram_bytes=min(limits.vram_bytes, int(LESS_AFTER_OOM * old.peak_vram_bytes)))
        else:
            limits = replace(limits, ram_bytes=min(limits.ram_bytes, int(LESS_AFTER_OOM * old.peak_ram_bytes)))
        try:
            (plan,) = plan_phases([ways.phases], machine, limits)
        except BudgetError:
            raise _ran_out(f"although {_peaks(old)} were planned, and it cannot be done with less", old) from None
        self.tell(f"{old.phase}: memory ran out, another program must have taken it; going on with {_peaks(plan)}")
        return plan

    def _kept(self, prompts: Iterable[str]) -> dict[str, Tensor]:
        """The embeddings that are on the disk."""
        found = {text: self.cache.get(self._key(text)) for text in prompts}
        return {text: embedding for text, embedding in found.items() if embedding is not None}

    def _key(self, text: str) -> str:
        return embedding_key(self.model.tokenizer.encode(text), self.model.text_encoder, self.hardware.dtype)

    def _embeddings(self, prompts: Sequence[str], ways: Ways | None, progress: Progress) -> dict[str, Tensor]:
        """Computed, and kept for the next time."""
        if ways is None:
            return {}
        found = dict(zip(prompts, self._within(ways, partial(self._encode, prompts, progress)), strict=True))
        self.model.text_encoder.require_unchanged()  # else they would be kept for other weights
        for text, embedding in found.items():
            self.cache.put(self._key(text), embedding)
        return found

    def _encode(self, prompts: Sequence[str], progress: Progress, done: int, plan: Plan) -> Iterator[Tensor]:
        hardware, component = self._hardware(plan), self.text_encoder
        table = self.model.text_encoder.tensors["embed_tokens.weight"]
        batches = list(_batches([self.model.tokenizer.encode(text) for text in prompts[done:]]))
        with self._open(component, plan) as weights, weights.passes(len(batches)) as stream:
            for batch in batches:
                rows = table.gather([row for prompt in batch for row in prompt]).to(hardware.device, hardware.dtype)
                embeddings = component.model(rows, [len(prompt) for prompt in batch], stream)
                _require_finite(embeddings, component.checkpoint, "the prompt's embedding", hardware.dtype)
                done += len(batch)
                progress("encode", done, len(prompts))
                yield from (embedding.cpu() for embedding in embeddings)

    def _schedule(self, request: GenerateOptions, plan: Plan) -> Schedule:
        assert request.shift is not None
        with self.meter.phase("denoise"):
            return schedule(self.transformer, request.steps, request.shift, self._hardware(plan))

    def _denoise(
        self, requests: Sequence[GenerateOptions], embeddings: Mapping[str, Tensor], times: Schedule, count: _Count,
        done: int, plan: Plan,
    ) -> Iterator[Tensor]:  # fmt: skip
        """-> latents [channels, height/8, width/8] float32 on the device, of requests[done:]."""
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
                    yield from latents
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
        batches, refined = list(_batches([embeddings[text].to(hardware.device) for text in prompts])), list[Caption]()
        with weights.prelude(len(batches)) as stream:
            for batch in batches:
                refined += cast(Transformer, self.transformer.model).refine_captions(batch, stream)
        tokens = [caption.tokens for caption in refined]
        _require_finite(tokens, self.model.transformer, "the refined prompt", hardware.dtype)
        return dict(zip(prompts, refined, strict=True))

    def _decode(self, latents: Sequence[Tensor], done: int, plan: Plan) -> Iterator[Tensor]:
        """-> images [height, width, 3] uint8 on the CPU, of latents[done:]."""
        hardware, model = self._hardware(plan), self.decoder.model
        decoder = cast(Decoder, model.get_submodule("decoder"))
        self.plans[plan.phase] = plan
        try:
            with self.meter.phase("decode"):
                read_into(model, self.decoder.rest, hardware)
            for latent in latents[done:]:
                with self.meter.phase("decode"):
                    image = decode_as_planned(decoder, latent.to(hardware.device), plan.way)
                    _require_finite([image], self.model.vae, "the decoded image", hardware.dtype)
                    pixels = to_pixels(image).cpu()
                    del image
                yield pixels
        finally:
            release(model)
            if hardware.device.type == "cuda":
                torch.cuda.empty_cache()

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
        self.plans[plan.phase] = plan
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


def _batches(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    """Prompts or embeddings, in order, together while they have at most TOKENS_PER_PASS."""
    batch: list[_Item] = []
    for item in items:
        if batch and sum(map(len, batch)) + len(item) > TOKENS_PER_PASS:  # type: ignore[arg-type]
            yield batch
            batch = []
        batch.append(item)
    yield batch


def _ran_out(how: str, plan: Plan) -> BudgetError:
    advice = "close other programs, or name a smaller --vram or --ram, a smaller image or a smaller format"
    return BudgetError(f"{plan.phase}: memory ran out {how}", fix=advice)


def _peaks(plan: Plan) -> str:
    gpu = f"{format_gb(plan.peak_vram_bytes)} of GPU memory and " if plan.device == "gpu" else ""
    return f"{gpu}{format_gb(plan.peak_ram_bytes)} of RAM"


def _require_finite(results: Sequence[Tensor], checkpoint: Checkpoint, what: str, dtype: torch.dtype) -> None:
    """Raise UserError if a result holds NaN or infinity: the weights are damaged, or the compute dtype overflowed."""
    if all(bool(torch.isfinite(result).all()) for result in results):
        return
    raise_if_damaged(checkpoint)
    raise overflow(f"{what} has", dtype)
