"""How far a kernel may be from its torch reference: what roundings explain, u being half a step of a dtype.

A comparison returns None, or what is wrong in a few words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from zimage_kernels import Int8Rows

UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@contextmanager
def prepared(device: torch.device) -> Iterator[None]:
    """New tensors are on the device, random ones the same every time, and torch.empty is full of NaN, so that an
    element which no kernel writes is seen."""
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.device(device), torch.inference_mode():
            torch.manual_seed(0)
            torch.use_deterministic_algorithms(True, warn_only=True)
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])


def worst(name: str, got: Tensor, truth: Tensor, allowed: Tensor) -> str | None:
    """Every element within what it is allowed. A comparison with NaN fails."""
    error = (got.double() - truth.double()).abs()
    if bool((error <= allowed).all()):
        return None
    return f"{name}: off by {(error / allowed).nan_to_num(nan=math.inf).max().item():.3g} times what rounding explains"


def rounded(name: str, got: Tensor, truth: Tensor, roundings: float = 1, part: Tensor | None = None) -> str | None:
    """truth, in float32, rounded to 16 bits so many times, and a part of it once before; sums of float32 in another
    order are within 1e-4 of their usual size, with a factor of 10 to spare."""
    floor = 1e-4 * truth.double().square().mean().sqrt()
    size = roundings * truth.double().abs() + (0 if part is None else part.double().abs())
    return worst(name, got, truth, UNIT[got.dtype] * size + floor)


def same_rows(name: str, got: Int8Rows, expected: Int8Rows) -> str | None:
    """Codes a step apart where float32 sums in another order fall on the other side of a half: 3e-5 of them; or where a
    value was rounded to bfloat16 before: that touches 2 % of the groups of 256, and 1 % of the codes in them. A
    scale moves by half a bfloat16 step of one element in 256: 2^-8 / 16."""
    steps = (got.codes.int() - expected.codes.int()).abs()
    if steps.max() > 1:
        return f"{name}: a code is {steps.max().item()} steps off"
    if steps.count_nonzero() > 1e-3 * steps.numel():
        return f"{name}: {steps.count_nonzero().item()} of {steps.numel()} codes differ"
    return worst(f"{name}, scales", got.scale, expected.scale, 2.0**-12 * expected.scale.double())


def first(problems: Iterable[str | None]) -> str | None:
    return next((problem for problem in problems if problem), None)
