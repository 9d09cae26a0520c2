"""VAE: ours, in exact bands of rows where a picture does not fit whole. It takes room while it runs, and keeps none."""

from __future__ import annotations

from typing import Any

import torch
from comfy.latent_formats import Flux
from comfy.sd import VAE
from torch import Tensor

from zimage_lite.config import VAE_FACTOR
from zimage_lite.errors import UserError
from zimage_lite.model.vae import latent_of
from zimage_lite.pipeline.drawing import Pipeline
from zimage_lite.pipeline.modules import Modules

from .running import make_room

_ROOM_BYTES = 2 * 10**9  # that ComfyUI is asked for; with less the bands are lower, and the pixels the same


class OurVae(VAE):
    """What ComfyUI's nodes call. Tiles are not needed: who asks for them gets the whole picture. Latents outside are on
    the scale that ComfyUI's Z-Image takes, whatever that of this VAE is; of the true one it is the same."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.modules, self.scale = Modules(pipeline), Flux()
        self.latent_channels, self.latent_dim, self.output_channels = Flux.latent_channels, 2, 3
        self.downscale_ratio = self.upscale_ratio = VAE_FACTOR
        self.downscale_index_formula = self.upscale_index_formula = self.extra_1d_channel = None
        self.crop_input, self.handles_tiling, self.disable_offload = True, True, False
        self.vae_dtype, self.device = pipeline.hardware.dtype, pipeline.hardware.device
        self.output_device = torch.device("cpu")
        self.first_stage_model = torch.nn.Module()

    def decode(self, samples_in: Tensor, vae_options: Any = None) -> Tensor:
        """[batch, 16, h, w], as the encoder gives it -> [batch, 8 h, 8 w, 3] in 0..1, float32 on the CPU."""
        make_room(_ROOM_BYTES)
        latents = self.scale.process_in(samples_in.float().cpu())
        images = torch.stack(self.modules.decode(list(latents)))
        return images.add_(1).div_(2).clamp_(0, 1).movedim(1, -1)

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """[batch, h, w, 3] in 0..1 -> [batch, 16, h / 8, w / 8], the most likely latents, float32 on the CPU."""
        make_room(_ROOM_BYTES)
        pixels = self.vae_encode_crop_pixels(pixel_samples)[..., :3].movedim(-1, 1) * 2 - 1
        config = self.modules.pipeline.model.vae.config
        latents = [latent_of(moments, config) for moments in self.modules.moments(list(pixels))]
        return self.scale.process_out(torch.stack(latents))

    def decode_tiled(self, samples: Tensor, *args: Any, **more: Any) -> Tensor:
        return self.decode(samples)

    def encode_tiled(self, pixel_samples: Tensor, *args: Any, **more: Any) -> Tensor:
        return self.encode(pixel_samples)

    def is_dynamic(self) -> bool:
        return False

    def throw_exception_if_invalid(self) -> None:
        """It was opened."""

    def get_sd(self) -> Any:
        raise UserError("this VAE is computed by zimage-lite and cannot be saved from here")
