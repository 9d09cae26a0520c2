"""Pipelines with more memory than they need and with too little, and what they hold."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor

from zimage_lite.checkpoint.model_files import open_model
from zimage_lite.config import GenerateOptions, RuntimeOptions
from zimage_lite.memory.placement import GRANULE_BYTES
from zimage_lite.memory.plan import FILE
from zimage_lite.pipeline.drawing import Pipeline
from zimage_lite.plan.job import Job
from zimage_lite.plan.prediction import ways_to_denoise

CAT = GenerateOptions("a cat", 64, 48, steps=2)


def free(model: Path, tell: Callable[[str], None] = lambda _: None) -> Pipeline:
    return Pipeline(open_model(model), RuntimeOptions("cpu", ram_bytes=4 * 10**9), tell)


def tight(model: Path, images: int = 1, request: GenerateOptions = CAT) -> Pipeline:
    """With a budget too small for the transformer's blocks, which come and go; not for so many latents."""
    first = free(model)
    first.generate([request])
    plan = first.plans["denoise"]
    blocks = sum(-(-size // GRANULE_BYTES) * GRANULE_BYTES for size in plan.sizes.values())
    both = [
        partial(ways_to_denoise, first.sizes, Job(*CAT.size, CAT.step_count, images=count)) for count in (1, images)
    ]
    one, all_of_them = (way.plan.peak_ram_bytes for way in first.work.planning.planned(both))
    budget = plan.peak_ram_bytes - blocks + 2 * GRANULE_BYTES + all_of_them - one
    made = Pipeline(open_model(model), RuntimeOptions("cpu", ram_bytes=budget))
    made.generate([request])
    assert images > 1 or set(made.plans["denoise"].homes.values()) == {FILE}
    return made


def held_bytes() -> int:
    """Of all tensors that this process can reach, those that only a cycle keeps included."""
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if issubclass(type(tensor), Tensor) and tensor.device.type == "cpu"
    }
    return sum(storages.values())


def difference(image: Tensor, truth: Tensor) -> int:
    """The largest, of uint8."""
    return int((image.int() - truth.int()).abs().max())
