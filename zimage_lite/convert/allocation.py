"""Bits where they count: for each of the transformer's tensors a format, so that the file has a wanted size and what
its linears give is as right as it can be.

The error of a tensor in a format is measured on some of its rows, as the share of the output's mean square that is
wrong, on the inputs of the statistics; all tensors count alike. What is chosen becomes rules of the recipe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from os import cpu_count

import torch
from torch import Tensor

from ..checkpoint.checkpoint import Checkpoint
from ..errors import UserError
from ..quant.formats import FORMATS, Format
from ..quant.inputs import Inputs
from ..units import format_gb
from .output_file import OutTensor, output_tensors
from .recipe import Rule, Target
from .streaming import Options

CANDIDATES = ("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0", "bf16")
SHORT_CANDIDATES = ("iq4_nl", "q5_0", "q8_0", "bf16")  # of rows that super-blocks of 256 do not fit
SAMPLES, SAMPLE_ROWS = 8, 16  # runs of rows of a tensor that are measured, evenly spaced, and their length


@dataclass(frozen=True)
class Choice:
    """A format for a tensor, what it takes and what goes wrong."""

    format: str
    nbytes: int
    error: float


def allocated(
    target: Target, source: Checkpoint, options: Options, progress: Callable[[int, int], None],
    begins: Callable[[], None] = lambda: None,
) -> Target:  # fmt: skip
    """The target with a rule for each tensor that it shrinks. progress: bytes of tensors that were measured, and of
    all; begins: called before the first. Raises UserError, before anything is measured, if no choice is small
    enough."""
    assert target.goal is not None
    tensors = output_tensors(source, target)
    shrunk = [tensor for tensor in tensors if tensor.format.lossy and len(tensor.shape) == 2]
    free = [tensor for tensor in shrunk if not _overridden(tensor, target)]
    kept = sum(tensor.nbytes for tensor in tensors) - sum(tensor.nbytes for tensor in free)
    weights = sum(tensor.rows * tensor.columns for tensor in tensors)
    budget = target.goal.bytes_of(weights) - kept
    least = sum(min(row.nbytes(tensor.rows, tensor.columns) for row in _candidates(tensor)) for tensor in free)
    if least > budget:
        smallest = f"{8 * (least + kept) / weights:.2f}bpw, {format_gb(least + kept)}"
        raise UserError(f"{target.name}: too small for this model", expected=f"{smallest} or more")
    begins()
    threads, measured, done = torch.get_num_threads(), dict[str, list[Choice]](), 0
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(cpu_count()) as pool:
            for tensor, found in zip(free, pool.map(partial(choices, options=options), free), strict=True):
                measured[tensor.name] = found
                done += tensor.nbytes
                progress(done, sum(tensor.nbytes for tensor in free))
    finally:
        torch.set_num_threads(threads)
    rules = tuple(Rule(name, choice.format) for name, choice in allocate(measured, budget).items())
    return replace(target, overrides=(*target.overrides, *rules))


def _overridden(tensor: OutTensor, target: Target) -> bool:
    spellings = (*(source.name for source in tensor.sources), tensor.name)
    return any(rule.fits(spellings, 0) for rule in target.overrides)


def choices(tensor: OutTensor, options: Options) -> list[Choice]:
    """What the tensor could be written in."""
    x = _sampled(tensor)
    known = options.calibration.inputs(tensor.sources[0].name) if options.calibration else None
    return [
        Choice(row.name, row.nbytes(tensor.rows, tensor.columns), error_in(row, x, options.effort, known))
        for row in _candidates(tensor)
    ]


def _candidates(tensor: OutTensor) -> list[Format]:
    rows = [FORMATS[name] for name in CANDIDATES]
    if rows[0].fits(tensor.columns):
        return rows
    return [FORMATS[name] for name in SHORT_CANDIDATES if FORMATS[name].fits(tensor.columns)]


def error_in(row: Format, x: Tensor, effort: str, known: Inputs | None) -> float:
    """x: some rows -> the share of their output's mean square that is wrong."""
    options = row.codec.options(x.shape[1])
    y = row.codec.dequantize(row.codec.quantize(x, options, effort, known), x.shape[1], options)
    known = known or Inputs(torch.ones(x.shape[1]))
    return float(known.error(y - x).sum() / known.error(x).sum().clamp(min=1e-30))


def _sampled(tensor: OutTensor) -> Tensor:
    """[rows, columns] float32: some of each source."""
    runs = []
    for source in tensor.sources:
        step = max(source.rows // SAMPLES // SAMPLE_ROWS, 1) * SAMPLE_ROWS
        starts = range(0, source.rows, step)[:SAMPLES]
        runs += [source.read_float(start, min(start + SAMPLE_ROWS, source.rows)) for start in starts]
    return torch.cat(runs)


def allocate(choices_of: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice]:
    """For each tensor one of its choices, all together within so many bytes, to the least sum of errors as far as
    steps along each tensor's convex hull go: always the step that gains most for a byte, while it fits."""
    hulls = {name: _hull(own) for name, own in choices_of.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    left = budget - sum(choice.nbytes for choice in chosen.values())
    steps = [
        ((before.error - after.error) / (after.nbytes - before.nbytes), name, before, after)
        for name, hull in hulls.items()
        for before, after in pairwise(hull)
    ]
    for _, name, before, after in sorted(steps, key=lambda step: (-step[0], step[1])):
        if chosen[name] is before and after.nbytes - before.nbytes <= left:
            chosen[name] = after
            left -= after.nbytes - before.nbytes
    return chosen


def _hull(own: Sequence[Choice]) -> list[Choice]:
    """From the smallest on, those that no mix of two others beats."""
    hull: list[Choice] = []
    for choice in sorted(own, key=lambda choice: (choice.nbytes, choice.error)):
        if hull and choice.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-2], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _gain(before: Choice, after: Choice) -> float:
    return (before.error - after.error) / max(after.nbytes - before.nbytes, math.ulp(1.0))
