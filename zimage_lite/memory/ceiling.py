"""What a plan says of a GPU's memory, enforced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .cuda import numbered
from .machine import ALLOCATOR_ROUNDING_BYTES, CUDA_CONTEXT_BYTES
from .plan import Plan


@contextmanager
def held_to(plan: Plan, device: torch.device) -> Iterator[None]:
    """torch's allocator gets what the plan leaves it beside the context, with what it had given out before. Who needs
    more runs out of memory, and can be planned again: Windows would let it spill into RAM without a word, at a fifth of
    the speed or less.

    A lower limit that was set before stays, and what was set comes back.
    """
    if plan.device != "gpu" or device.type != "cuda":
        yield
        return
    device = numbered(device)
    before = torch.cuda.get_per_process_memory_fraction(device)
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    room = plan.peak_vram_bytes - CUDA_CONTEXT_BYTES + ALLOCATOR_ROUNDING_BYTES
    torch.cuda.set_per_process_memory_fraction(min(room / total_bytes, before), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)
