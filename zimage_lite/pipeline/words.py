"""What images are told, and in which step."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import GenerateOptions, known_by
from ..model.tokens import padded
from .levels import is_within

VARIED_SHARE = 0.2  # of the steps are told the varied prompt: those that lay out the picture
_VARIED_VALUES = 0.5  # of the embedding's values are moved


@dataclass(frozen=True)
class Segment:
    """A part of a prompt that has pictures between its words: it stands in no frame of its own."""

    text: str


@dataclass(frozen=True)
class Words:
    """A text, and how far the values of its embedding are moved, by which seed. references: what the pictures are known
    by that stand between its words; aligned: where these lie, see `omni.Told`."""

    text: str
    variation: float = 0.0
    seed: int = 0
    references: tuple[Hashable, ...] = ()
    aligned: bool = False

    @property
    def prompts(self) -> list[str | Segment]:
        """What of it is encoded, apart: as diffusers' ZImageOmniPipeline cuts it, one in front of each picture and two
        around the one that is drawn."""
        if not self.references:
            return [self.text]
        between = "<|vision_end|><|vision_start|>"
        return [
            Segment("<|im_start|>user\n<|vision_start|>"),
            *[Segment(between)] * (len(self.references) - 1),
            Segment(f"<|vision_end|>{self.text}<|im_end|>\n<|im_start|>assistant\n<|vision_start|>"),
            Segment("<|vision_end|><|im_end|>"),
        ]

    def length(self, tokens: Mapping[str | Segment, int]) -> int:
        """Of its caption; of several segments, padded. tokens: of what is encoded."""
        lengths = [tokens[prompt] for prompt in self.prompts]
        return lengths[0] if len(lengths) == 1 else sum(map(padded, lengths))

    def told(self, embedding: Tensor) -> Tensor:
        """[tokens, width] -> the same shape, device and dtype: half of the values, moved by up to `variation` each way
        (the SeedVarianceEnhancer of ComfyUI's users, who take 15 to 30 for this model). Turbo draws nearly the same
        picture from every noise; it does not from every embedding."""
        if not self.variation:
            return embedding
        generator = torch.Generator("cpu").manual_seed(self.seed)
        moves = torch.rand(embedding.shape, generator=generator).mul_(2).sub_(1).mul_(self.variation)
        moves *= torch.rand(embedding.shape, generator=generator) < _VARIED_VALUES
        return (embedding.float() + moves.to(embedding.device)).to(embedding.dtype)


def all_words(request: GenerateOptions) -> list[Words]:
    """Whatever an image is told in some step."""
    plain = [_words(request, text) for text in texts(request)]
    return [_varied(request), *plain] if request.variation else plain


def words(request: GenerateOptions, step: int, steps: int, sigma: float) -> list[Words]:
    """In this step: the prompt, and where guidance is on, what to steer away from."""
    varied = request.variation and step < math.ceil(VARIED_SHARE * steps)
    prompt = _varied(request) if varied else _words(request, request.prompt)
    return [prompt, _words(request, request.negative)] if is_guided(request, step, steps, sigma) else [prompt]


def is_guided(request: GenerateOptions, step: int, steps: int, sigma: float) -> bool:
    """cfg_truncation is diffusers': the time 1 - sigma after which guidance is off."""
    start, end = request.guidance_range
    within = is_within(step, steps, start, end) and 1 - sigma <= request.cfg_truncation
    return bool(request.guidance) and within


def texts(request: GenerateOptions) -> list[str]:
    """The prompt, and with guidance what to steer away from."""
    return [request.prompt, request.negative] if request.guidance else [request.prompt]


def prompts(request: GenerateOptions) -> list[str | Segment]:
    """What is encoded of these."""
    return [prompt for text in texts(request) for prompt in _words(request, text).prompts]


def _varied(request: GenerateOptions) -> Words:
    return _words(request, request.prompt, request.variation, request.seed)


def _words(request: GenerateOptions, text: str, variation: float = 0.0, seed: int = 0) -> Words:
    aligned = request.reference_positions == "aligned"
    return Words(text, variation, seed, tuple(map(known_by, request.references or ())), aligned)
