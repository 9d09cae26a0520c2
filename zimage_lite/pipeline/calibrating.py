"""Watches what the transformer's linears are given while it draws."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from ..calibration.statistics import STEP_RANGES, Moments, Statistics, block_width, input_of, row_weights
from ..config import PATCH_SIZE, SEQUENCE_MULTIPLE, GenerateOptions
from ..errors import UserError
from ..model.float16 import FEED_FORWARD_SCALE, scale_in
from ..model.linear import Linear
from ..model.transformer import is_time_weight
from ..units import round_up
from .denoise import BLOCKS, Step
from .drawing import Pipeline
from .steps import modulations
from .workspace import Progress, silent

_TIMED = "t_embedder.mlp.0.weight"
FULL = 2**30  # of the width of blocks of products: whole rows
# Of blocks, in whole super-blocks of K-quants: of the true model 20 GB, 3.8 GB and 0.8 GB. The widest is taken that
# takes no more than this share of the memory that may be used.
WIDTHS = (FULL, 1280, 256)
SHARE = 0.25
TIMES = 512  # that the time's own linears are seen at
SAVING_SHARE = 0.05  # of the time, at most, is spent on writing what was gathered so far


def begun(pipeline: Pipeline, width: int | None, settings: dict[str, Any]) -> Statistics:
    """Nothing seen yet, of all linears of the transformer. width: of the blocks of products, 0 for none; None: what
    suits the memory. What they take is there at once, so that it is planned with."""
    linears = _linears(pipeline)
    if width is None:
        limit = SHARE * (pipeline.options.ram_bytes or psutil.virtual_memory().total)
        wide = [module.weight.shape[1] for name, module in linears.items() if _has_products(name)]
        sizes = {own: sum(4 * columns * block_width(columns, own) for columns in wide) for own in WIDTHS}
        width = next((own for own in WIDTHS if sizes[own] <= limit), WIDTHS[-1])
    inputs = {
        name: Moments.empty(module.weight.shape[1], width if _has_products(name) else 0)
        for name, module in linears.items()
    }
    return Statistics(asdict(pipeline.model.transformer.config), settings, [], inputs)


def require_like(kept: Statistics, new: Statistics, where: str) -> None:
    """Raise UserError unless what was gathered can be added to."""
    if kept.settings != new.settings or _shapes(kept) != _shapes(new):
        got, expected = str(kept.settings), str(new.settings)
        if got == expected:
            got, expected = (f"X^T X in blocks of up to {_widest(own)} columns" for own in (kept, new))
        raise UserError(f"{where}: was gathered otherwise", got=got, expected=expected, fix="add --overwrite")


def gather(
    pipeline: Pipeline, requests: Sequence[GenerateOptions], statistics: Statistics, save: Callable[[], None],
    progress: Progress = silent,
) -> None:  # fmt: skip
    """Draw all but the pixels, and add what was seen to the statistics. save: is called now and then, with nothing half
    seen, and in the end. Raises UserError, BudgetError."""
    saved, took, done = time.monotonic(), 0.0, 0
    _see_times(pipeline, statistics)
    with _watching(pipeline, statistics, timed=False) as on_step:
        for places in pipeline.denoised(requests, progress, on_step):
            statistics.prompts += [requests[place].prompt for place in places]
            done += len(places)
            if done < len(requests) and time.monotonic() - saved >= took / SAVING_SHARE:
                start = time.monotonic()
                save()
                saved = time.monotonic()
                took = saved - start
    save()


def _see_times(pipeline: Pipeline, statistics: Statistics) -> None:
    """What depends on the time alone is computed for all of it, so that it serves any steps."""
    if float(statistics.inputs[_TIMED].counts.sum()):
        return  # they were there before
    with _watching(pipeline, statistics, timed=True), torch.inference_mode():
        modulations(pipeline.denoising.component, torch.linspace(0, 1, TIMES), pipeline.hardware)


@contextmanager
def _watching(pipeline: Pipeline, statistics: Statistics, timed: bool) -> Iterator[Callable[[Step], None]]:
    """Yields what is to be told of each step. timed: watch the linears of the time alone, else the others."""
    quarter, weights = 0, dict[str, Tensor]()  # of rows, by the first part of a linear's name

    def on_evaluation(module: nn.Module, given: tuple[Any, ...]) -> None:
        images = [latent[0].numel() // PATCH_SIZE**2 for latent in given[0]]
        padded = [round_up(image, SEQUENCE_MULTIPLE) for image in images]
        whole = [image + len(caption.tokens) for image, caption in zip(padded, given[1], strict=True)]
        weights["noise_refiner"] = row_weights(images, padded)
        weights["layers"] = weights["all_final_layer"] = row_weights(images, whole)

    def on_step(step: Step) -> None:
        nonlocal quarter
        quarter = step.step % step.of * STEP_RANGES // step.of

    def see(moments: Moments, scale: float, part: str, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        x = given[0]
        factor = scale_in(x.dtype, scale)
        moments.add(x if factor == 1 else x.float() / factor, quarter, weights.get(part))

    handles = [pipeline.denoising.transformer.register_forward_pre_hook(on_evaluation)]
    for name, module in _linears(pipeline).items():
        if is_time_weight(name) != timed:
            continue
        scale = FEED_FORWARD_SCALE if name.endswith(".feed_forward.w2.weight") else 1.0
        handles.append(
            module.register_forward_pre_hook(partial(see, statistics.inputs[name], scale, name.split(".")[0]))
        )
    try:
        yield on_step
    finally:
        for handle in handles:
            handle.remove()


def _linears(pipeline: Pipeline) -> dict[str, Linear]:
    """The transformer's, one for each input, by the names of their weights."""
    named = pipeline.denoising.transformer.named_modules()
    linears = {f"{name}.weight": module for name, module in named if isinstance(module, Linear)}
    return {name: module for name, module in linears.items() if input_of(name) == name}


def _has_products(name: str) -> bool:
    """Of what recipes shrink."""
    return name.split(".")[0] in BLOCKS


def _widest(statistics: Statistics) -> int:
    return max((own.products.shape[1] for own in statistics.inputs.values() if own.products is not None), default=0)


def _shapes(statistics: Statistics) -> dict[str, object]:
    return {
        name: (own.squares.shape, own.products is None or own.products.shape) for name, own in statistics.inputs.items()
    }
