"""Which tensor gets which format: data, one table per target.

GGUF files follow what llama.cpp's patched quantizer does for this model, so that they equal what people already use:
blocks are quantized; embedders, refiners and the final layer stay 16-bit; vectors are float32. ComfyUI int8 files
follow the official int8 file: every linear of a block, refiners included.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from .formats import FORMATS, Format

_TRANSFORMER_KEPT = ("*t_embedder.*", "*x_embedder.*", "*final_layer.*", "*cap_embedder.*", "*siglip_embedder.*")
_REFINERS = ("context_refiner.*", "noise_refiner.*", "siglip_refiner.*")


@dataclass(frozen=True)
class Recipe:
    """Patterns are matched against canonical names, first match wins."""

    default: str
    keep: tuple[str, ...] = ()
    tensors: tuple[tuple[str, str], ...] = ()  # (pattern, format)
    vectors: str | None = None  # format of 1-D tensors; None: as the kept ones

    def format_of(self, name: str, shape: tuple[int, ...], source: Format) -> Format:
        """The format a tensor is written in. What is kept stays 16-bit: float16 if it was, else bfloat16."""
        kept = FORMATS["f16" if source.name == "f16" else "bf16"]
        if len([size for size in shape if size > 1]) < 2:  # vectors, and the pad tokens, [1, dim]
            return FORMATS[self.vectors] if self.vectors else kept
        if not name.endswith(".weight") or any(fnmatchcase(name, pattern) for pattern in self.keep):
            return kept
        wanted = next((to for pattern, to in self.tensors if fnmatchcase(name, pattern)), self.default)
        return FORMATS[wanted] if FORMATS[wanted].fits(shape[-1]) else kept


def transformer_recipe(target: Format) -> Recipe:
    if target.container == "safetensors":
        return Recipe(target.name, keep=_TRANSFORMER_KEPT)
    tensors = (("*.feed_forward.w2.weight", "q4_1"),) if target.name == "q4_0" else ()
    return Recipe(target.name, keep=_TRANSFORMER_KEPT + _REFINERS, tensors=tensors, vectors="f32")


def text_encoder_recipe(target: Format) -> Recipe:
    if target.container == "safetensors":
        return Recipe(target.name, keep=("embed_tokens.weight",))
    # The embedding is gathered by rows and never multiplied, and it is tied to nothing that runs: 8 bits are plenty.
    tensors = (("embed_tokens.weight", "q8_0"),) if target.lossy else ()
    return Recipe(target.name, tensors=tensors, vectors="f32")
