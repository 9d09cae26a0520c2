"""What the model has in mind so far, as a small picture: by TAEF1 where its file is given, by the model's own decoder
where that is as small, else by colour alone.

All of it happens on the CPU and only when somebody looks, so neither the GPU's memory nor its stream knows of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint.model_files import ModelFiles
from ..checkpoint.taef1 import open_taef1
from ..memory.hardware import Hardware
from ..model.preview import latent_rgb, reduced
from ..model.taef1 import TinyDecoder
from ..model.vae import Decoder, to_pixels
from .weights import Component, read_into

Previewer = Callable[[Tensor], Tensor]  # x0 [16, h, w] float32 on any device -> [., ., 3] uint8 on the CPU

SMALL_BYTES = 2**23  # the demo's autoencoder has 2 MB, TAEF1 10 MB, Flux's 168 MB
_LONGEST = 64  # latent pixels that a decoder gets: 512 of the picture


def previewer(model: ModelFiles, taef1: Path | None = None) -> Previewer:
    """Raises UserError if the file is not TAEF1."""
    if taef1 is not None:
        return _decoding(Component(TinyDecoder(), open_taef1(taef1), ()))
    if model.vae.nbytes <= SMALL_BYTES:
        return _decoding(Component(nn.ModuleDict({"decoder": Decoder(model.vae.config)}), model.vae, ()))
    return lambda x0: latent_rgb(x0.cpu())


def _decoding(component: Component) -> Previewer:
    read_into(component.model, component.rest, Hardware(torch.device("cpu"), torch.float32))
    decoder = component.model["decoder"] if isinstance(component.model, nn.ModuleDict) else component.model

    @torch.inference_mode()
    def preview(x0: Tensor) -> Tensor:
        return to_pixels(decoder(reduced(x0.cpu(), _LONGEST)))

    return preview
