"""Pipelines of diffusers whose transformer, text encoder and VAE are ours: planned within --vram and --ram, streamed,
with our kernels. Everything around them is diffusers' own: loops, schedulers, callbacks.

pipe = load_pipeline("Z-Image-Turbo-q4_k_m", vram="6GB")
image = pipe("a red fox", num_inference_steps=9, guidance_scale=0.0).images[0]
"""

from __future__ import annotations

try:
    from diffusers import ZImageControlNetInpaintPipeline as _newest  # noqa: F401
except ImportError as error:
    raise ImportError(
        "zimage_lite.diffusers needs diffusers 0.42 or newer: pip install 'zimage-lite[diffusers]'"
    ) from error

from .controlnet import load_controlnet
from .pipelines import (
    ZImageControlNetInpaintPipeline,
    ZImageControlNetPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImagePipeline,
    load_pipeline,
)

__all__ = [
    "ZImageControlNetInpaintPipeline", "ZImageControlNetPipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline",
    "ZImagePipeline", "load_controlnet", "load_pipeline",
]  # fmt: skip
