"""Prompt to image in three phases. Each one opens its model, uses the whole budget, and closes it again.

encode: prompts -> embeddings     denoise: noise -> latents, 8 steps     decode: latents -> pixels
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .checkpoint.checkpoint import Checkpoint
from .checkpoint.model_files import ModelFiles
from .config import PATCH_SIZE, SEQUENCE_MULTIPLE, VAE_FACTOR, GenerateOptions, RuntimeOptions
from .errors import UserError
from .loading import Budget, Component, budget, host_spare_bytes, loaded, raise_if_damaged
from .memory.hardware import probe
from .memory.meter import Meter
from .memory.plan import Placement, activation_bytes
from .memory.plan_vae import VaePlan, plan_decode
from .model.banded import Banded
from .model.linear import Stream
from .model.scheduler import euler_step, guided, initial_noise, model_time, sigmas
from .model.text_encoder import TextEncoder
from .model.transformer import Caption, Transformer
from .model.vae import Decoder, to_pixels
from .prompt_cache import PromptCache, cache_folder, embedding_key

TOKENS_PER_PASS = 1024  # prompts are encoded and refined together up to this many tokens

Progress = Callable[[str, int, int], None]  # phase, done, total
_Item = TypeVar("_Item")


def silent(phase: str, done: int, total: int) -> None:
    """No progress display."""


@dataclass
class Pipeline:
    """Holds no weights between calls, only open headers. `meter` and the plans tell what the last call used."""

    model: ModelFiles
    options: RuntimeOptions = field(default_factory=RuntimeOptions)
    meter: Meter = field(default_factory=Meter)
    plans: dict[str, Placement] = field(default_factory=dict)
    decode_plans: list[VaePlan] = field(default_factory=list)  # of each image
    limit: Budget | None = None  # of the call that is running: what a phase leaves behind is in the allocator's slack

    def __post_init__(self) -> None:
        if self.options.backend == "triton":
            raise UserError("--backend triton: there are no Triton kernels yet", fix="use auto or reference")
        self.hardware = probe(self.options.device, self.options.dtype)
        self.cache = PromptCache(cache_folder() if self.options.cache else None)

    @torch.inference_mode()
    def generate(self, requests: Sequence[GenerateOptions], progress: Progress = silent) -> list[Tensor]:
        """-> one [height, width, 3] uint8 tensor per request, on the CPU."""
        if not requests:
            return []
        requests = [self.complete(request) for request in requests]
        texts = list(dict.fromkeys(text for request in requests for text in _texts(request)))
        self.limit = self._sufficient_budget(requests, texts)
        try:
            with self.meter.phase("encode"):
                embeddings = dict(zip(texts, self.encode(texts, progress), strict=True))
            with self.meter.phase("denoise"):
                latents = self.denoise(requests, embeddings, progress)
            with self.meter.phase("decode"):
                return self.decode(latents, progress)
        finally:
            self.limit = None

    def complete(self, request: GenerateOptions) -> GenerateOptions:
        """What was left open is what the model says of itself."""
        width, height = self.model.default_size
        return replace(
            request,
            width=width if request.width is None else request.width,
            height=height if request.height is None else request.height,
            shift=self.model.scheduler.shift if request.shift is None else request.shift,
        )

    def encode(self, texts: Sequence[str], progress: Progress = silent) -> list[Tensor]:
        """-> the embedding of each text: [tokens, width] on the device, in the compute dtype. Kept ones are not
        computed again."""
        found = self._kept(texts)
        unknown = [text for text in dict.fromkeys(texts) if text not in found]
        if unknown:
            embeddings = self._encode(unknown, progress)
            self.model.text_encoder.require_unchanged()  # else they would be kept for other weights
            for text, embedding in zip(unknown, embeddings, strict=True):
                self.cache.put(self._key(text), embedding)
                found[text] = embedding
        return [found[text] for text in texts]

    def _kept(self, texts: Iterable[str]) -> dict[str, Tensor]:
        """The embeddings that are on the disk."""
        found = {text: self.cache.get(self._key(text)) for text in texts}
        return {text: rows.to(self.hardware.device) for text, rows in found.items() if rows is not None}

    def _key(self, text: str) -> str:
        return embedding_key(self.model.tokenizer.encode(text), self.model.text_encoder, self.hardware.dtype)

    def _encode(self, texts: Sequence[str], progress: Progress) -> list[Tensor]:
        table = self.model.text_encoder.tensors["embed_tokens.weight"]
        batches = list(_batches([self.model.tokenizer.encode(text) for text in texts]))
        component, embeddings = self._text_encoder(batches), []
        with self._open(component) as stream:
            for done, batch in enumerate(batches, start=1):
                rows = table.gather([row for prompt in batch for row in prompt])
                rows = rows.to(self.hardware.device, self.hardware.dtype)
                embeddings += component.model(rows, [len(prompt) for prompt in batch], stream)
                progress("encode", done, len(batches))
        _require_finite(embeddings, component.checkpoint, "the prompt's embedding")
        return embeddings

    def denoise(
        self, requests: Sequence[GenerateOptions], embeddings: dict[str, Tensor], progress: Progress = silent
    ) -> list[Tensor]:
        """embeddings: by text. -> latents [channels, height/8, width/8] float32 on the device."""
        component = self._transformer(requests, {text: len(rows) for text, rows in embeddings.items()})
        transformer, checkpoint = component.model, component.checkpoint
        assert isinstance(transformer, Transformer)
        done, total, latents = 0, sum(request.steps for request in requests), []
        with self._open(component) as stream:
            refined: list[Caption] = []
            for batch in _batches(embeddings.values()):
                refined += transformer.refine_captions(batch, stream)
            captions = dict(zip(embeddings, refined, strict=True))
            for request in requests:
                latent = torch.empty(0)
                for latent in self._steps(transformer, request, [captions[text] for text in _texts(request)], stream):
                    done += 1
                    progress("denoise", done, total)
                    _require_finite([latent], checkpoint, f"the image after step {done}")
                latents.append(latent)
        return latents

    def decode(self, latents: Sequence[Tensor], progress: Progress = silent) -> list[Tensor]:
        """-> images [height, width, 3] uint8, on the CPU."""
        limit = self.limit or budget(self.options, self.hardware)
        sizes = [(latent.shape[1] * VAE_FACTOR, latent.shape[2] * VAE_FACTOR) for latent in latents]
        component, self.decode_plans = self._decoder(sizes, limit)
        decoder, images = component.model.get_submodule("decoder"), []
        assert isinstance(decoder, Decoder)
        with self._open(component):
            for latent, plan in zip(latents, self.decode_plans, strict=True):
                image = decode_as_planned(decoder, latent, plan)
                _require_finite([image], component.checkpoint, "the decoded image")
                images.append(to_pixels(image).cpu())
                progress("decode", len(images), len(latents))
        return images

    def _steps(
        self, transformer: Transformer, request: GenerateOptions, captions: list[Caption], stream: Stream
    ) -> Iterator[Tensor]:
        """The Euler loop of one image; yields the latent after each step. captions: positive, negative if guided."""
        device, dtype = self.hardware.device, self.hardware.dtype
        width, height = (pixels // VAE_FACTOR for pixels in request.size)
        shift = self.model.scheduler.shift if request.shift is None else request.shift
        latent = initial_noise(request.seed, transformer.config.in_channels, height, width).to(device)
        for sigma, sigma_next in pairwise(sigmas(request.steps, shift)):
            outputs = transformer([latent.to(dtype)] * len(captions), captions, model_time(sigma).to(device), stream)
            wide = [output.float() for output in outputs]
            denoising = guided(wide[0], wide[1], request.guidance) if request.guidance else wide[0]
            latent = euler_step(latent, -denoising, sigma, sigma_next)
            yield latent

    def _sufficient_budget(self, requests: Sequence[GenerateOptions], texts: Sequence[str]) -> Budget:
        """The budget of all three phases, before the first one starts. Raises BudgetError for the hungriest of them."""
        limit = budget(self.options, self.hardware)
        prompts = {text: self.model.tokenizer.encode(text) for text in texts}
        kept = self._kept(texts)
        unknown = [ids for text, ids in prompts.items() if text not in kept]
        components = (
            *([self._text_encoder(list(_batches(unknown)))] if unknown else []),
            self._transformer(requests, {text: len(ids) for text, ids in prompts.items()}),
            self._decoder([request.size[::-1] for request in requests], limit)[0],
        )
        max(components, key=lambda component: component.least_bytes(self.hardware, limit)).plan(self.hardware, limit)
        return limit

    def _text_encoder(self, batches: Sequence[list[list[int]]]) -> Component:
        c, item_bytes = self.model.text_encoder.config, self.hardware.dtype.itemsize
        tokens = [sum(map(len, batch)) for batch in batches]
        activations = activation_bytes(
            max(tokens), c.hidden_size, c.intermediate_size, c.num_attention_heads, item_bytes
        )
        results = sum(tokens) * c.hidden_size * item_bytes
        return Component(TextEncoder(c), self.model.text_encoder, ("layers",), activations + results)

    def _transformer(self, requests: Sequence[GenerateOptions], lengths: Mapping[str, int]) -> Component:
        """lengths: text -> tokens."""
        c, item_bytes = self.model.transformer.config, self.hardware.dtype.itemsize
        largest = max(sum(_tokens(request, lengths[text]) for text in _texts(request)) for request in requests)
        together = max(sum(map(_padded, batch)) for batch in _batches(lengths.values(), length=int))
        activations = activation_bytes(max(largest, together), c.dim, c.ffn_dim, c.n_heads, item_bytes)
        captions = sum(_padded(length) * c.dim + length * c.cap_feat_dim for length in lengths.values()) * item_bytes
        blocks = ("context_refiner", "noise_refiner", "layers")
        return Component(Transformer(c), self.model.transformer, blocks, activations + captions)

    def _decoder(self, sizes: Sequence[tuple[int, int]], limit: Budget) -> tuple[Component, list[VaePlan]]:
        """sizes: height and width of each image. -> and how to decode each: whole where that fits, else in bands."""
        c, hardware = self.model.vae.config, self.hardware
        results = 3 * sum(map(math.prod, sizes))
        component = Component(nn.ModuleDict({"decoder": Decoder(c)}), self.model.vae, (), results)
        spare = limit.total_bytes - component.least_bytes(hardware, limit)
        host, whole = host_spare_bytes(self.options, hardware), hardware.dtype != torch.float16
        plans = [plan_decode(c, *size, hardware.dtype.itemsize, spare, host, whole) for size in sizes]
        working = max(plan.device_bytes for plan in plans)
        return replace(component, working_bytes=results + working), plans

    @contextmanager
    def _open(self, component: Component) -> Iterator[Stream]:
        with loaded(component, self.hardware, self.limit or budget(self.options, self.hardware)) as opened:
            self.plans[component.checkpoint.component] = opened.plan
            yield opened.stream


def decode_as_planned(decoder: Decoder, latent: Tensor, plan: VaePlan) -> Tensor:
    """-> image [3, height, width] in the compute dtype, on the device."""
    if not plan.rows_per_band:
        return cast(Tensor, decoder(latent))
    store = torch.device("cpu") if plan.spilled else None
    return Banded(plan.rows_per_band, plan.store_input, plan.store_hidden, store).decode(decoder, latent)


def _texts(request: GenerateOptions) -> list[str]:
    """The prompt, and with guidance what to steer away from."""
    return [request.prompt, request.negative] if request.guidance else [request.prompt]


def _tokens(request: GenerateOptions, caption_tokens: int) -> int:
    """Length of the transformer's sequence, pads included."""
    image_tokens = math.prod(request.size) // (VAE_FACTOR * PATCH_SIZE) ** 2
    return _padded(image_tokens) + _padded(caption_tokens)


def _batches(items: Iterable[_Item], length: Callable[[Any], int] = len) -> Iterator[list[_Item]]:
    """Prompts, embeddings or whatever has a length, in order, together while they have at most TOKENS_PER_PASS."""
    batch: list[_Item] = []
    for item in items:
        if batch and sum(map(length, batch)) + length(item) > TOKENS_PER_PASS:
            yield batch
            batch = []
        batch.append(item)
    yield batch


def _padded(length: int) -> int:
    return -(-length // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE


def _require_finite(results: Sequence[Tensor], checkpoint: Checkpoint, what: str) -> None:
    """Raise UserError if a result holds NaN or infinity: the weights are damaged, or the compute dtype overflowed."""
    if all(bool(torch.isfinite(result).all()) for result in results):
        return
    raise_if_damaged(checkpoint)
    raise UserError(
        f"{what} is not a number, though all weights of {checkpoint.source} are", fix="try --dtype bf16 or --dtype fp32"
    )
