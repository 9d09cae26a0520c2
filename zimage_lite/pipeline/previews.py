"""What the model has in mind so far, as a small picture: by TAEF1 where its file is given, else by colour alone.

All of it happens on the CPU and only when somebody looks, so neither the GPU's memory nor its stream knows of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.model_files import ModelFiles
from ..checkpoint.taef1 import open_taef1
from ..memory.hardware import Hardware
from ..model.preview import FLUX, latent_rgb, reduced
from ..model.taef1 import TinyDecoder
from ..model.vae import to_pixels
from .weights import Component, read_into

Previewer = Callable[[Tensor], Tensor]  # x0 [16, h, w] float32 on any device -> [., ., 3] uint8 on the CPU

_LONGEST = 32  # latent pixels that TAEF1 gets: 256 of the picture: see PREVIEW_BYTES


def previewer(model: ModelFiles, taef1: Path | None = None) -> Previewer:
    """Raises UserError if the file is not TAEF1. By colour alone, a pixel stands for 8 x 8."""
    if taef1 is None:
        layers = model.colours or FLUX
        return lambda x0: latent_rgb(x0.cpu(), layers)
    decoder = TinyDecoder()
    component = Component(decoder, open_taef1(taef1), ())
    read_into(decoder, component.rest, Hardware(torch.device("cpu"), torch.float32))

    @torch.inference_mode()
    def preview(x0: Tensor) -> Tensor:
        return to_pixels(decoder(reduced(x0.cpu(), _LONGEST)))

    return preview
