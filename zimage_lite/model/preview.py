"""What a latent will look like, for next to nothing: the colour of each latent pixel as a function of its channels.

It is applied to the model's guess of x0, not to the noisy x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .vae import to_pixels

# One layer after another, with ReLU between; a layer has a row for each output: what it takes of each input, and its
# bias. The last gives red, green and blue in [-1, 1].
ColourLayers = Sequence[Sequence[Sequence[float]]]

# ComfyUI's fit to the latents of Flux's autoencoder, scaled as the transformer has them.
FLUX: ColourLayers = (
    (
        (
            -0.0346, 0.0034, 0.0275, -0.0174, 0.0859, 0.0004, 0.0405, -0.0236,
            -0.0245, 0.1008, -0.0515, 0.0428, 0.0817, -0.1264, -0.0280, -0.1262, -0.0329,
        ),
        (
            0.0244, 0.0210, -0.0668, 0.0160, 0.0721, 0.0383, 0.0861, -0.0185,
            0.0250, 0.0755, 0.0201, -0.0012, 0.0765, -0.0522, -0.0881, -0.0982, -0.0718,
        ),
        (
            0.0681, 0.0687, -0.0433, 0.0617, 0.0329, 0.0115, 0.0915, -0.0259,
            0.1180, -0.0421, 0.0011, -0.0036, 0.0749, -0.1103, -0.0499, -0.0778, -0.0851,
        ),
    ),
)  # fmt: skip


def latent_rgb(x0: Tensor, layers: ColourLayers = FLUX) -> Tensor:
    """[16, height/8, width/8] float32, as the transformer leaves it -> [height/8, width/8, 3] uint8, on its device."""
    x = x0.flatten(1)
    for depth, rows in enumerate(layers):
        weight = x.new_tensor(rows)
        x = torch.addmm(weight[:, -1:], weight[:, :-1], x.relu() if depth else x)
    return to_pixels(x.unflatten(1, x0.shape[1:]))


def reduced(x0: Tensor, most: int) -> Tensor:
    """Averaged so that neither side is longer than `most`. [channels, height, width] -> the same channels."""
    height, width = x0.shape[1:]
    scale = most / max(height, width)
    if scale >= 1:
        return x0
    size = max(round(height * scale), 1), max(round(width * scale), 1)
    return F.interpolate(x0[None], size=size, mode="area")[0]
