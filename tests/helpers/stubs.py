"""Files of tensors that have names and shapes alone."""

from __future__ import annotations

import math
from pathlib import Path

from make_checkpoint import SIZES, component_shapes, renamed

from zimage_lite.checkpoint import safetensors
from zimage_lite.checkpoint.names import (
    LLAMA_CPP_QWEN3,
    NATIVE_TRANSFORMER,
    flux_vae,
)
from zimage_lite.config import TextEncoderConfig, TransformerConfig, VaeConfig

Shape = tuple[int, ...]
TRANSFORMER = component_shapes(TransformerConfig())
TEXT_ENCODER = component_shapes(TextEncoderConfig())
VAE = component_shapes(VaeConfig())
MAPS = {"transformer": NATIVE_TRANSFORMER, "text_encoder": LLAMA_CPP_QWEN3, "vae": flux_vae()}
TINY = {
    component: component_shapes(config)
    for component, config in zip(("transformer", "text_encoder", "vae"), SIZES["tiny"], strict=True)
}


def foreign(component: str) -> dict[str, Shape]:
    """The tiny component as other programs name it."""
    return {name: shape for name, (_, shape) in renamed(TINY[component], MAPS[component]).items()}


def write(path: Path, shapes: dict[str, Shape], dtype: str = "BF16", metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file of zeros."""
    header, offsets = safetensors.encode_header(
        [(name, dtype, shape) for name, shape in shapes.items()], metadata or {}
    )
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(offsets[-1] + 8 * math.prod(list(shapes.values())[-1]))
    return path


def stubs(*names: str) -> dict[str, Shape]:
    return dict.fromkeys(names, (2, 2))
