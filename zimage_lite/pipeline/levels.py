"""The noise levels that an image goes through."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import GenerateOptions
from ..model.samplers import first_sigma
from ..model.schedules import SCHEDULES, diffusers_tail, tail


def levels_of(request: GenerateOptions, strength: float = 1.0) -> tuple[float, ...]:
    """From the first to 0, each as float32 has it. request: complete. strength: how much of the schedule a picture goes
    through. By its own rule that is always as many steps as were asked for, of a schedule that is longer (ComfyUI's:
    the few steps of Turbo would leave a weak change two); by diffusers', the end of this one."""
    if request.sigmas:
        return request.sigmas
    assert request.shift is not None
    shorten = tail if request.strength_mode == "steps" else diffusers_tail
    found = shorten(SCHEDULES[request.schedule], request.step_count, request.shift, strength)
    return tuple(first_sigma(request.sampler, found, request.shift).tolist())


def as_tensor(levels: tuple[float, ...]) -> Tensor:
    """[steps + 1] float32."""
    return torch.tensor(levels)
