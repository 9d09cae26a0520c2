"""The files that a recipe makes of the true model, planned and not written."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from make_checkpoint import component_shapes

from zimage_lite.checkpoint.checkpoint import Checkpoint
from zimage_lite.checkpoint.stored import StoredTensor
from zimage_lite.config import TextEncoderConfig, TransformerConfig
from zimage_lite.convert.output_file import OutTensor, output_tensors
from zimage_lite.convert.recipe import target
from zimage_lite.quant.formats import FORMATS

CONFIGS = {"transformer": TransformerConfig(), "text_encoder": TextEncoderConfig()}


@cache
def true_model(component: str) -> Checkpoint:
    """The released model's names and shapes in bf16, as tools/make_checkpoint.py writes them."""
    shapes = component_shapes(CONFIGS[component])
    tensors = {name: StoredTensor(name, FORMATS["bf16"], shape, {}) for name, shape in shapes.items()}
    return Checkpoint(component, Path(), "", tensors, CONFIGS[component])


@cache
def planned(to: str, component: str = "transformer") -> dict[str, OutTensor]:
    return {tensor.name: tensor for tensor in output_tensors(true_model(component), target(to))}


def n_bytes(tensors: dict[str, OutTensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
