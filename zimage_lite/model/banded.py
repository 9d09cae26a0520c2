"""The autoencoder in bounded memory: bands of rows go through the same layers and give the same result, without seams.

A group norm needs the mean and the variance of its whole input, so no tile can go through the network on its own. A
layer can: each is run over all bands before the next one starts, and the statistics of what it writes are summed up on
the way. A map here is `Rows`: something that gives any of its rows. It is either stored, or it computes the rows when
they are asked for, from the rows of other maps that the convolutions on the way reach. What is not stored is computed
once more each time it is read: that is how memory is traded for time, at the level of full size, where the memory is.

In units of one value per image pixel, in the true model:
    decoding, all stored     384   the input of the first residual block at full size (256), its hidden map (128)
    input not stored         256   the stream and the hidden map of the other blocks (128 each); 1.25 x the products
    nor hidden maps          192   the first block's hidden map (128), the level below (64); 1.3 x the products
    encoding                 256, or 160
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .vae import Decoder, Encoder, MidBlock, PixelAttention, ResBlock

_FP16_SCALE = 2.0**-6  # of the maps: 65504 is too little for them, and the norms that read them cancel it
_REACH = 2  # rows that a residual block's output depends on, above and below


@dataclass
class Moments:
    """Mean and variance of each channel, in pieces of some pixels each."""

    counts: list[int] = field(default_factory=list)
    pieces: list[Tensor] = field(default_factory=list)  # [2, channels] float32 each

    def add(self, rows: Tensor) -> None:
        variance, mean = torch.var_mean(rows.float().flatten(1), dim=1, correction=0)
        self.counts.append(rows[0].numel())
        self.pieces.append(torch.stack((variance, mean)))

    def of_groups(self, n_groups: int) -> tuple[Tensor, Tensor]:
        """-> mean, variance: [n_groups, 1] float64, of all pixels and the channels of each group."""
        pieces = torch.stack(self.pieces)
        pieces = pieces.to(torch.float32 if pieces.device.type == "mps" else torch.float64)  # mps has no float64
        weights = torch.tensor(self.counts, dtype=pieces.dtype, device=pieces.device)
        share = (weights / weights.sum())[:, None, None]
        variances, means = pieces.unflatten(2, (n_groups, -1)).unbind(1)  # [pieces, groups, channels of a group]
        mean = (means * share).sum(0).mean(1, keepdim=True)
        variance = ((variances + (means - mean).square()) * share).sum(0).mean(1, keepdim=True)
        return mean, variance


@dataclass
class Rows:
    """A map of height x width pixels. read(top, bottom): its rows, [channels, bottom - top, width], on the device."""

    height: int
    width: int
    read: Callable[[int, int], Tensor]
    moments: Moments | None = None


class Map(Rows):
    """One that is stored. The tensor may lie in another memory than the one that computes."""

    def __init__(self, tensor: Tensor, device: torch.device, moments: Moments | None = None) -> None:
        super().__init__(
            tensor.shape[1], tensor.shape[2], lambda top, bottom: tensor[:, top:bottom].to(device), moments
        )
        self.tensor = tensor


def scaled(image: Tensor, scale: float) -> Rows:
    def read(top: int, bottom: int) -> Tensor:
        rows = image[:, top:bottom]
        return rows if scale == 1 else rows * scale

    return Rows(image.shape[1], image.shape[2], read)


def convolved(x: Rows, conv: nn.Conv2d, scale: float = 1.0) -> Rows:
    """Pads with zeros so that height and width are divided by the stride. scale: that of the maps."""
    kernel, stride, before = conv.kernel_size[0], conv.stride[0], conv.padding[0]
    assert isinstance(before, int) and conv.bias is not None
    after = kernel - stride - before
    bias = conv.bias if scale == 1 else conv.bias * scale

    def read(top: int, bottom: int) -> Tensor:
        first, last = top * stride - before, (bottom - 1) * stride - before + kernel
        rows = x.read(max(first, 0), min(last, x.height))
        missing = (0, after - before, max(-first, 0), max(last - x.height, 0))
        if any(missing):
            rows = F.pad(rows, missing)
        return F.conv2d(rows, conv.weight, bias, stride, (0, before))

    return Rows(x.height // stride, x.width // stride, read)


def doubled(x: Rows) -> Rows:
    """Every pixel four times."""

    def read(top: int, bottom: int) -> Tensor:
        first = top // 2
        rows = F.interpolate(x.read(first, -(-bottom // 2)).unsqueeze(0), scale_factor=2.0, mode="nearest")[0]
        return rows[:, top - 2 * first : bottom - 2 * first]

    return Rows(2 * x.height, 2 * x.width, read)


def added(new: Rows, x: Rows) -> Rows:
    """new: one that is computed, so that its rows may be overwritten."""
    return Rows(x.height, x.width, lambda top, bottom: new.read(top, bottom).add_(x.read(top, bottom)))


@dataclass(frozen=True)
class Banded:
    """Runs the autoencoder's modules, `rows_per_band` rows of a map at a time.

    store_input, store_hidden: whether the maps at full size that could be computed again are stored: the input of that
    level, and what lies between the two convolutions of its residual blocks.
    store: where the maps are kept, if not on the device that computes.
    """

    rows_per_band: int
    store_input: bool = True
    store_hidden: bool = True
    store: torch.device | None = None

    def decode(self, decoder: Decoder, latent: Tensor) -> Tensor:
        """As `Decoder.forward`."""
        c, scale = decoder.config, self._scale(decoder.conv_in)
        raw = (latent / c.scaling_factor + c.shift_factor) * scale
        x: Rows = Map(raw.to(decoder.conv_in.weight.dtype), latent.device)
        x = self._mid_block(decoder.mid_block, self._stored(convolved(x, decoder.conv_in, scale)))
        levels: Any = decoder.up_blocks
        for level in levels:
            full_size = len(level.upsamplers) == 0
            for resnet in level.resnets:
                x = self._res_block(resnet, x, store_hidden=self.store_hidden or not full_size)
            for sampler in level.upsamplers:
                x = convolved(doubled(x), sampler.conv, scale)
                if self.store_input or level is not levels[-2]:
                    x = self._stored(x)
        return self._end(x, decoder)

    def encode(self, encoder: Encoder, image: Tensor) -> Tensor:
        """As `Encoder.forward`."""
        scale = self._scale(encoder.conv_in)
        x = convolved(scaled(image, scale), encoder.conv_in, scale)
        if self.store_input:
            x = self._stored(x)
        levels: Any = encoder.down_blocks
        for level in levels:
            full_size = level is levels[0]
            for resnet in level.resnets:
                x = self._res_block(resnet, x, store_hidden=self.store_hidden or not full_size)
            for sampler in level.downsamplers:
                x = self._stored(convolved(x, sampler.conv, scale))
        assert isinstance(x, Map)
        return self._end(self._mid_block(encoder.mid_block, x), encoder)

    def _res_block(self, block: ResBlock, x: Rows, store_hidden: bool = True) -> Map:
        """What comes out takes the place of the hidden map, or else that of the input."""
        scale = self._scale(block.conv1)
        hidden = convolved(self._normed(x, block.norm1, scale), block.conv1, scale)
        in_place = x if isinstance(x, Map) and block.conv_shortcut is None and not store_hidden else None
        if in_place is None:
            hidden = in_place = self._stored(hidden)
        shortcut = x if block.conv_shortcut is None else convolved(x, block.conv_shortcut, scale)
        new = convolved(self._normed(hidden, block.norm2, scale), block.conv2, scale)
        return self._stored(added(new, shortcut), in_place)

    def _mid_block(self, block: MidBlock, x: Map) -> Map:
        parts: Any = block
        x = self._attention(parts.attentions[0], self._res_block(parts.resnets[0], x))
        return self._res_block(parts.resnets[1], x)

    def _attention(self, block: PixelAttention, x: Map) -> Map:
        """Eight times smaller than the image, so whole, but for the scores."""
        rows = x.read(0, x.height)
        normed = self._normed(x, block.group_norm, activate=False).read(0, x.height)
        return Map(block.attended(normed).mul_(self._scale(block.group_norm)).add_(rows), rows.device)

    def _end(self, x: Rows, model: Encoder | Decoder) -> Tensor:
        out = convolved(self._normed(x, model.conv_norm_out), model.conv_out)
        return torch.cat([out.read(top, bottom) for top, bottom in self._bands(out)], dim=1)

    def _normed(self, x: Rows, norm: nn.GroupNorm, scale: float = 1.0, activate: bool = True) -> Rows:
        """The norm and its activation. scale: what comes out is multiplied by it."""
        if x.moments is None:
            x.moments = Moments()
            for top, bottom in self._bands(x):
                x.moments.add(x.read(top, bottom))
        mean, variance = x.moments.of_groups(norm.num_groups)
        deviation = (variance + norm.eps * self._scale(norm) ** 2).sqrt()
        weight, bias = (p.to(mean.dtype).unflatten(0, (norm.num_groups, -1)) for p in (norm.weight, norm.bias))
        factor = weight / deviation
        factor, shift = (t.reshape(-1, 1, 1).float() for t in (factor, bias - mean * factor))

        def read(top: int, bottom: int) -> Tensor:
            rows = torch.addcmul(shift, x.read(top, bottom), factor)
            rows = F.silu(rows, inplace=True) if activate else rows
            return (rows if scale == 1 else rows.mul_(scale)).to(norm.weight.dtype)

        return Rows(x.height, x.width, read)

    def _stored(self, x: Rows, in_place: Map | None = None) -> Map:
        """in_place: a map that this one takes the place of; its rows are overwritten when no band reads them again."""
        tensor = None if in_place is None else in_place.tensor
        moments, device = Moments(), None
        waiting: deque[tuple[int, int, Tensor]] = deque()
        for top, bottom in self._bands(x):
            rows = x.read(top, bottom)
            moments.add(rows)
            device = rows.device
            if tensor is None:
                tensor = rows.new_empty((len(rows), x.height, x.width), device=self.store)
            waiting.append((top, bottom, rows))
            done = bottom - _REACH if in_place is not None and bottom < x.height else bottom
            while waiting and waiting[0][1] <= done:
                first, last, rows = waiting.popleft()
                tensor[:, first:last] = rows
            del rows
        assert tensor is not None and device is not None
        return Map(tensor, device, moments)

    def _bands(self, x: Rows) -> Iterator[tuple[int, int]]:
        for top in range(0, x.height, self.rows_per_band):
            yield top, min(top + self.rows_per_band, x.height)

    @staticmethod
    def _scale(module: nn.Conv2d | nn.GroupNorm) -> float:
        return _FP16_SCALE if module.weight.dtype == torch.float16 else 1.0
