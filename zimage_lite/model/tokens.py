"""Latents and captions as the tokens that the S3-DiT sees, and where these lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import PATCH_SIZE, SEQUENCE_MULTIPLE
from .float16 import stream_dtype
from .rope import Rope, grid_positions


def image_positions(latent: Tensor, plane: int) -> Tensor:
    """[tokens, 3]: an image lies on one plane; its pad tokens all sit at the origin."""
    height, width = (size // PATCH_SIZE for size in latent.shape[1:])
    return at_origin(grid_positions((1, height, width), (plane, 0, 0)))


def at_origin(positions: Tensor) -> Tensor:
    """With those of pad tokens."""
    return F.pad(positions, (0, 0, 0, missing(len(positions))))


def patchify(latent: Tensor) -> Tensor:
    """[channels, height, width] -> [height/2 * width/2, 4 * channels]; in a token, channels run fastest."""
    channels, height, width = latent.shape
    patches = latent.view(channels, height // PATCH_SIZE, PATCH_SIZE, width // PATCH_SIZE, PATCH_SIZE)
    return patches.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)


def unpatchify(tokens: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `patchify` on the first tokens; what follows them (pads, caption) is dropped."""
    channels, height, width = shape
    rows, columns = height // PATCH_SIZE, width // PATCH_SIZE
    patches = tokens[: rows * columns].view(rows, columns, PATCH_SIZE, PATCH_SIZE, channels)
    return patches.permute(4, 0, 2, 1, 3).reshape(shape)


def interleaved(images: Sequence[Tensor], captions: Sequence[Tensor]) -> Tensor:
    """[tokens, dim] each -> one tensor, each image with its caption behind it."""
    return torch.cat([part for pair in zip(images, captions, strict=True) for part in pair])


def missing(length: int) -> int:
    return -length % SEQUENCE_MULTIPLE


def padded(length: int) -> int:
    return length + missing(length)


def pad(tokens: Tensor, pad_token: Tensor) -> Tensor:
    """Fill up with the learned pad token, which is attended like any other."""
    return torch.cat([tokens, pad_token.expand(missing(len(tokens)), -1)])


def residual(parts: list[Tensor]) -> Tensor:
    """The stream that the blocks add to: what was embedded, one after another."""
    x = torch.cat(parts)
    return x.to(stream_dtype(x.dtype))


def joined_ropes(ropes: list[Rope]) -> Rope:
    return torch.cat([cos for cos, _ in ropes]), torch.cat([sin for _, sin in ropes])
