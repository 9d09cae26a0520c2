"""First phase: prompts -> embeddings. The same prompt is never encoded twice.

A prompt is a text, a segment of one, or the tokens that somebody else made of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import TypeVar

from torch import Tensor
from zimage_kernels import Backend

from ..checkpoint.model_files import ModelFiles
from ..memory.plan import Plan
from ..model.float16 import stream_dtype
from ..model.linear import release
from ..model.text_encoder import TextEncoder
from ..plan.job import batched
from ..plan.model_sizes import Model
from ..plan.prediction import ways_to_encode
from ..plan.retry import Ways
from .finite import require_finite
from .prompt_cache import PromptCache, cache_folder, embedding_key
from .weights import Component
from .words import Segment
from .workspace import Progress, WaysOn, Workspace

Prompt = str | Segment | tuple[int, ...]
_Prompt = TypeVar("_Prompt", bound=Prompt)


class Encode:
    """unpacking: what unpacks the encoder's weights, which are never multiplied in 8 bits."""

    def __init__(self, model: ModelFiles, sizes: Model, unpacking: Backend, work: Workspace) -> None:
        self.model, self.sizes, self.unpacking, self.work = model, sizes, unpacking, work
        self.cache = PromptCache(cache_folder() if work.options.cache else None)

    @cached_property
    def component(self) -> Component:
        return Component(
            TextEncoder(self.model.text_encoder.config, self.unpacking), self.model.text_encoder, ("layers",)
        )

    def tokens(self, prompts: Iterable[_Prompt]) -> dict[_Prompt, int]:
        """How many each has, with the frame of a chat around it."""
        return {prompt: len(self._ids(prompt)) for prompt in prompts}

    def kept(self, prompts: Iterable[_Prompt]) -> dict[_Prompt, Tensor]:
        """The embeddings that are on the disk."""
        found = {prompt: self.cache.get(self._key(prompt)) for prompt in prompts}
        return {prompt: embedding for prompt, embedding in found.items() if embedding is not None}

    def ways(self, tokens: Sequence[int]) -> WaysOn:
        """What there is to plan. tokens: of each prompt."""
        return partial(ways_to_encode, self.sizes, tokens)

    def embeddings(self, prompts: Sequence[_Prompt], ways: Ways, progress: Progress) -> dict[_Prompt, Tensor]:
        """Of each [tokens, width] on the CPU, in the dtype of the residual stream; kept for the next time."""
        encoded = self.work.planning.within(ways, partial(self.run, prompts, progress))
        found = dict(zip(prompts, encoded, strict=True))
        self.model.text_encoder.require_unchanged()  # else they would be kept for other weights
        for prompt, embedding in found.items():
            self.cache.put(self._key(prompt), embedding)
        return found

    def run(self, prompts: Sequence[Prompt], progress: Progress, done: int, plan: Plan) -> Iterator[Tensor]:
        """Of prompts[done:], as planned."""
        hardware, component = self.work.hardware_of(plan), self.component
        table = self.model.text_encoder.tensors["embed_tokens.weight"]
        batches = batched([self._ids(prompt) for prompt in prompts[done:]], len)
        kept = stream_dtype(self.work.hardware.dtype)  # also where the CPU encodes in float32 for the GPU
        with self.work.open(component, plan) as weights, weights.passes(len(batches)) as stream:
            for batch in batches:
                rows = table.gather([row for prompt in batch for row in prompt]).to(hardware.device, hardware.dtype)
                embeddings = component.model(rows, [len(prompt) for prompt in batch], stream)
                require_finite(embeddings, component.checkpoint, "the prompt's embedding", hardware.dtype)
                done += len(batch)
                progress("encode", done, len(prompts))
                yield from (embedding.to("cpu", kept) for embedding in embeddings)

    def release(self) -> None:
        if "component" in vars(self):  # else it was never made
            release(self.component.model)

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, Segment):
            return self.model.tokenizer.encode_plain(prompt.text)
        return self.model.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _key(self, prompt: Prompt) -> str:
        return embedding_key(self._ids(prompt), self.model.text_encoder, self.work.hardware.dtype)
