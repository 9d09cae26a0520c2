"""The Flux-1 autoencoder: a convolutional encoder and decoder around one attention layer, 8x reduction.

Both work on a single image: [channels, height, width]. Module names follow diffusers' AutoencoderKL.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import VAE_QUERIES, VaeConfig
from .linear import Linear

_EPS = 1e-6
_LOG_VARIANCES = (-30.0, 20.0)  # of a posterior, as diffusers bounds them


def _conv(
    in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, padding: int | None = None
) -> nn.Conv2d:
    padding = kernel // 2 if padding is None else padding
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding, device="meta")


def _norm(channels: int, config: VaeConfig) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_num_groups, channels, eps=_EPS, device="meta")


class ResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, config: VaeConfig) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(in_channels, config), _conv(in_channels, out_channels)
        self.norm2, self.conv2 = _norm(out_channels, config), _conv(out_channels, out_channels)
        self.conv_shortcut = _conv(in_channels, out_channels, kernel=1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


class PixelAttention(nn.Module):
    """One head over all pixels."""

    def __init__(self, channels: int, config: VaeConfig) -> None:
        super().__init__()
        self.group_norm = _norm(channels, config)
        self.to_q, self.to_k, self.to_v = (Linear(channels, channels, bias=True) for _ in range(3))
        self.to_out = nn.ModuleList([Linear(channels, channels, bias=True)])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attended(self.group_norm(x)[0])

    def attended(self, normed: Tensor) -> Tensor:
        """[channels, height, width] -> the same. A few queries at a time: a GPU that has no fused attention for heads
        as wide as this one writes all scores down."""
        pixels = normed.flatten(1).T  # [height * width, channels]
        k, v = (project(pixels)[None, None] for project in (self.to_k, self.to_v))
        out = torch.empty_like(normed)
        for some, into in zip(pixels.split(VAE_QUERIES), out.flatten(1).split(VAE_QUERIES, dim=1), strict=True):
            mixed = F.scaled_dot_product_attention(self.to_q(some)[None, None], k, v)[0, 0]
            into.copy_(self.to_out[0](mixed).T)
        return out


class MidBlock(nn.Module):
    def __init__(self, channels: int, config: VaeConfig) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(channels, channels, config) for _ in range(2)])
        self.attentions = nn.ModuleList([PixelAttention(channels, config)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Resample(nn.Module):
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv


class Halving(Resample):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # one row and column, at the far ends only


class Doubling(Resample):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one size, then a change of size unless it is the last level. Has no `forward`: who calls one
    holds its input until it ends, a map of the largest size that nothing reads any more."""

    def __init__(self, in_channels: int, out_channels: int, n_blocks: int, config: VaeConfig) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * n_blocks
        self.resnets = nn.ModuleList([ResBlock(a, b, config) for a, b in pairwise(widths)])

    def layers(self) -> Iterator[nn.Module]:
        for part in self.children():
            assert isinstance(part, nn.ModuleList)
            yield from part


class DownLevel(Level):
    def __init__(self, in_channels: int, out_channels: int, config: VaeConfig, last: bool) -> None:
        super().__init__(in_channels, out_channels, config.layers_per_block, config)
        convs = [] if last else [Halving(_conv(out_channels, out_channels, stride=2, padding=0))]
        self.downsamplers = nn.ModuleList(convs)


class UpLevel(Level):
    def __init__(self, in_channels: int, out_channels: int, config: VaeConfig, last: bool) -> None:
        super().__init__(in_channels, out_channels, config.layers_per_block + 1, config)
        self.upsamplers = nn.ModuleList([] if last else [Doubling(_conv(out_channels, out_channels))])


def _layers(levels: nn.ModuleList) -> Iterator[nn.Module]:
    for level in levels:
        assert isinstance(level, Level)
        yield from level.layers()


def _pairs(widths: list[int]) -> list[tuple[int, int, bool]]:
    """Each level's input width, output width, and whether it is the last."""
    return [(widths[max(i - 1, 0)], width, i == len(widths) - 1) for i, width in enumerate(widths)]


class Encoder(nn.Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        widths = list(config.block_out_channels)
        self.conv_in = _conv(config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList([DownLevel(a, b, config, last) for a, b, last in _pairs(widths)])
        self.mid_block = MidBlock(widths[-1], config)
        self.conv_norm_out = _norm(widths[-1], config)
        self.conv_out = _conv(widths[-1], 2 * config.latent_channels)

    def forward(self, image: Tensor) -> Tensor:
        """[3, height, width] in [-1, 1], in the compute dtype -> moments of the posterior, [2 latent_channels,
        height/8, width/8]: means, then logarithms of variances."""
        x = self.conv_in(image.unsqueeze(0))
        for layer in _layers(self.down_blocks):
            x = layer(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x), inplace=True))[0]


class Decoder(nn.Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        widths = list(reversed(config.block_out_channels))
        self.conv_in = _conv(config.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], config)
        self.up_blocks = nn.ModuleList([UpLevel(a, b, config, last) for a, b, last in _pairs(widths)])
        self.conv_norm_out = _norm(widths[-1], config)
        self.conv_out = _conv(widths[-1], config.in_channels)

    def forward(self, latent: Tensor) -> Tensor:
        """[latent_channels, height, width] float32, as the transformer leaves it -> image [3, 8 height, 8 width] in the
        compute dtype, about [-1, 1]."""
        raw = latent / self.config.scaling_factor + self.config.shift_factor
        x = self.mid_block(self.conv_in(raw.unsqueeze(0).to(self.conv_in.weight.dtype)))
        for layer in _layers(self.up_blocks):
            x = layer(x)
        return self.conv_out(F.silu(self.conv_norm_out(x), inplace=True))[0]


HALVES: dict[str, type[Encoder] | type[Decoder]] = {"encoder": Encoder, "decoder": Decoder}


def latent_of(moments: Tensor, config: VaeConfig, noise: Tensor | None = None) -> Tensor:
    """What `Encoder.forward` gives -> latent [latent_channels, height, width] float32, scaled as the transformer wants
    it: the mean, or with noise of that shape a sample."""
    latent, log_variance = moments.float().chunk(2)
    if noise is not None:
        latent = latent + torch.exp(0.5 * log_variance.clamp(*_LOG_VARIANCES)) * noise
    return (latent - config.shift_factor) * config.scaling_factor


def from_pixels(picture: Tensor, dtype: torch.dtype) -> Tensor:
    """[height, width, 3] uint8 -> [3, height, width] in [-1, 1]."""
    image = picture.permute(2, 0, 1).contiguous().float()
    return image.div_(255).mul_(2).sub_(1).to(dtype)


def to_pixels(image: Tensor) -> Tensor:
    """[3, height, width] in [-1, 1] -> [height, width, 3] uint8."""
    return (image.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
