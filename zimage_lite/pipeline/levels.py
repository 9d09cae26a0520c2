"""The noise levels that an image goes through."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..config import GenerateOptions
from ..errors import UserError
from ..model.samplers import first_sigma
from ..model.schedules import SCHEDULES, diffusers_tail, tail


def levels_of(request: GenerateOptions, strength: float = 1.0) -> tuple[float, ...]:
    """From the first to 0, each as float32 has it. request: complete. strength: how much of the schedule a picture goes
    through. By its own rule that is always as many steps as were asked for, of a schedule that is longer (ComfyUI's:
    the few steps of Turbo would leave a weak change two); by diffusers', the end of this one. Raises UserError."""
    assert request.shift is not None
    if request.sigmas:
        found = as_tensor(request.sigmas)
    else:
        shorten = tail if request.strength_mode == "steps" else diffusers_tail
        found = shorten(SCHEDULES[request.schedule], request.step_count, request.shift, strength)
    levels = tuple(first_sigma(request.sampler, found, request.shift).tolist())
    if any(level <= after for level, after in pairwise(levels)):
        flag, got = ("--sigmas", request.sigmas) if request.sigmas else ("--shift", request.shift)
        raise UserError(flag, got=got, expected="noise levels that float32 tells apart")
    return levels


def is_within(step: int, steps: int, start: float, end: float) -> bool:
    """Whether a step begins between two parts of all of them. 0.28 of 25 are 7, though not in floating point."""
    return round(start * steps, 6) <= step < round(end * steps, 6)


def as_tensor(levels: tuple[float, ...]) -> Tensor:
    """[steps + 1] float32."""
    return torch.tensor(levels)
