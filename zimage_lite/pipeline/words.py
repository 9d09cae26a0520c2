"""What images are told, and in which step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import GenerateOptions
from .levels import is_within

VARIED_SHARE = 0.2  # of the steps are told the varied prompt: those that lay out the picture
_VARIED_VALUES = 0.5  # of the embedding's values are moved


@dataclass(frozen=True)
class Words:
    """A text, and how far the values of its embedding are moved, by which seed."""

    text: str
    variation: float = 0.0
    seed: int = 0

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
    plain = [Words(text) for text in texts(request)]
    return [_varied(request), *plain] if request.variation else plain


def words(request: GenerateOptions, step: int, steps: int, sigma: float) -> list[Words]:
    """In this step: the prompt, and where guidance is on, what to steer away from."""
    varied = request.variation and step < math.ceil(VARIED_SHARE * steps)
    prompt = _varied(request) if varied else Words(request.prompt)
    return [prompt, Words(request.negative)] if is_guided(request, step, steps, sigma) else [prompt]


def is_guided(request: GenerateOptions, step: int, steps: int, sigma: float) -> bool:
    """cfg_truncation is diffusers': the time 1 - sigma after which guidance is off."""
    start, end = request.guidance_range
    within = is_within(step, steps, start, end) and 1 - sigma <= request.cfg_truncation
    return bool(request.guidance) and within


def texts(request: GenerateOptions) -> list[str]:
    """The prompt, and with guidance what to steer away from."""
    return [request.prompt, request.negative] if request.guidance else [request.prompt]


def _varied(request: GenerateOptions) -> Words:
    return Words(request.prompt, request.variation, request.seed)
