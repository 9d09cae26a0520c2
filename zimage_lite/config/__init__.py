"""Every setting and its default, in one place. Model sizes come from the checkpoint; these are the true model's.

Pure data: importing this loads neither torch nor any other heavy library.
"""

from .image import GenerateOptions
from .limits import (
    BACKENDS,
    COMPUTES,
    DEFAULT_SIZE,
    DEFAULT_STRENGTH,
    DEVICES,
    DTYPES,
    FITS,
    FLOAT16_SUMS,
    INPAINT_AREAS,
    MAX_LORA_STRENGTH,
    MAX_PROMPT_TOKENS,
    MAX_STEPS,
    MOST_PER_ROUND,
    PATCH_SIZE,
    RANDOM_SEED,
    SAMPLERS,
    SCHEDULES,
    SEQUENCE_MULTIPLE,
    SIZE_MULTIPLE,
    STRENGTH_MODES,
    TILED_PIXELS,
    TOKENS_PER_PASS,
    VAE_FACTOR,
    VAE_QUERIES,
)
from .lora import Lora
from .models import SchedulerConfig, TextEncoderConfig, TransformerConfig, VaeConfig, from_mapping
from .runtime import RuntimeOptions

__all__ = [
    "BACKENDS",
    "COMPUTES",
    "DEFAULT_SIZE",
    "DEFAULT_STRENGTH",
    "DEVICES",
    "DTYPES",
    "FITS",
    "FLOAT16_SUMS",
    "INPAINT_AREAS",
    "MAX_LORA_STRENGTH",
    "MAX_PROMPT_TOKENS",
    "MAX_STEPS",
    "MOST_PER_ROUND",
    "PATCH_SIZE",
    "RANDOM_SEED",
    "SAMPLERS",
    "SCHEDULES",
    "SEQUENCE_MULTIPLE",
    "SIZE_MULTIPLE",
    "STRENGTH_MODES",
    "TILED_PIXELS",
    "TOKENS_PER_PASS",
    "VAE_FACTOR",
    "VAE_QUERIES",
    "GenerateOptions",
    "Lora",
    "RuntimeOptions",
    "SchedulerConfig",
    "TextEncoderConfig",
    "TransformerConfig",
    "VaeConfig",
    "from_mapping",
]
