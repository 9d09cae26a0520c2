"""Files of latents: what the transformer leaves, before it is decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.output import replacing
from ..config import VAE_FACTOR, GenerateOptions
from ..errors import UserError

_NAME = "latents"


def save_latents(path: Path, latent: Tensor) -> None:
    """latent: [channels, height/8, width/8] float32, scaled as the transformer has it. Whole or not at all."""
    from safetensors.torch import save

    with replacing(path) as partial:
        partial.write_bytes(save({_NAME: latent.contiguous()}))


def read_latents(source: Any, channels: int, request: GenerateOptions) -> Tensor:
    """source: a path, or a tensor. -> [channels, height/8, width/8] float32. Raises UserError."""
    latent = source if isinstance(source, Tensor) else _read(Path(source))
    if latent.ndim == 4 and len(latent) == 1:
        latent = latent[0]
    if latent.ndim != 3 or latent.shape[0] != channels or any(side % 2 or not side for side in latent.shape[1:]):
        expected = f"{channels} channels, height and width even"
        raise UserError("--latents", got=f"shape {tuple(latent.shape)}", expected=expected)
    if not torch.isfinite(latent).all():
        raise UserError("--latents: holds NaN or infinite values")
    size = latent.shape[2] * VAE_FACTOR, latent.shape[1] * VAE_FACTOR
    named = request.width or size[0], request.height or size[1]
    if named != size:
        raise UserError(
            "--latents", got="{}x{}".format(*size), expected="the size that is asked for: {}x{}".format(*named)
        )
    return latent.float()


def _read(path: Path) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            name = _NAME if _NAME in names else names[0] if len(names) == 1 else None
            if name is None:
                raise UserError(f"{path}: no tensor of latents", got=", ".join(names[:3]), expected=_NAME)
            return file.get_tensor(name)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", expected="what --save-latents wrote") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a safetensors file", expected="what --save-latents wrote") from error
