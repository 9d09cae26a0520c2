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
        found = torch.tensor(request.sigmas)
    else:
        shorten = tail if request.strength_mode == "steps" else diffusers_tail
        found = shorten(SCHEDULES[request.schedule], request.step_count, request.shift, strength)
    levels = tuple(first_sigma(request.sampler, found, request.shift).tolist())
    falling = all(sigma > after for sigma, after in pairwise(levels))
    if not (falling and levels[0] <= 1):  # samplers divide by what lies between, and a shift of nearly 0 by nothing
        what = "--sigmas" if request.sigmas else f"--shift {request.shift:g} in {request.step_count} steps"
        raise UserError(f"{what}: noise levels that float32 does not tell apart", fix="put them farther apart")
    return levels


def as_tensor(levels: tuple[float, ...]) -> Tensor:
    """[steps + 1] float32."""
    return torch.tensor(levels)
