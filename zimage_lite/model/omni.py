"""The S3-DiT that also sees pictures, as Omni-Base and Edit. As diffusers has it (ZImageOmniPipeline, 0.42): there are
no released weights, nor another word of its authors'.

    segments of the caption -> embed, pad -> context refiner -----.
    features of references  -> embed, pad -> SigLIP refiner -------> [images, caption and features] -> blocks -> ...
    latents, of references and the image -> patches -> noise refiner -'

What stands behind a caption's name here is all that is the same in every step: its segments, one before each reference
and the prompt after them, and the references' features. References' latents go through the noise refiner beside the
image, and so are seen anew in each step.

The time does to references, to the segments before them and to their features what it does to a picture without noise
(t = 1): their rows are modulated apart. Blocks without modulation do not see the difference.

Attention does not look at the order of tokens but at their positions, so they lie here as is convenient: the image
first, and rows that are modulated alike next to each other. diffusers has [caption, images, features].
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from operator import itemgetter

import torch
from torch import Tensor, nn

from ..config import PATCH_SIZE, SEQUENCE_MULTIPLE, OmniConfig, TransformerConfig
from .compute import REFERENCE, Compute
from .linear import Linear, RMSNorm, Stream
from .rope import grid_positions
from .tokens import at_origin, image_positions, joined_ropes, missing, pad, padded, residual
from .transformer import Block, Caption, Modulation, Transformer, Vectors

REFINER = "siglip_refiner"  # its list of blocks
_PLANES = 2  # behind each segment: of its image, then of the image's features


@dataclass(frozen=True)
class Seen:
    """A reference. latent: [channels, height, width], in the compute dtype; features: [rows, columns, siglip_feat_dim],
    of the vision tower."""

    latent: Tensor
    features: Tensor


@dataclass(frozen=True)
class Told:
    """What an image is told. segments: [length, cap_feat_dim] each, of the text encoder: one, or two more than there
    are references. aligned: the ids of a segment's tokens begin where the segment does; else as diffusers has them."""

    segments: Sequence[Tensor]
    seen: Sequence[Seen] = ()
    aligned: bool = False

    @property
    def starts(self) -> list[int]:
        """The first position of each segment."""
        return list(accumulate((len(segment) + _PLANES for segment in self.segments[:-1]), initial=1))

    @property
    def planes(self) -> list[int]:
        """The position of each reference, and of the image, among the segments."""
        ends = [start + len(segment) for start, segment in zip(self.starts, self.segments, strict=True)]
        return ends[: len(self.seen) + 1]

    def positions(self) -> Tensor:
        """[tokens, 3], of the segments with their pad tokens.

        Of a padded length, diffusers makes ids for all of it, and again for what was padded; so those of each segment
        lie behind their tokens by what all before it were padded (its issue 13574). Nobody can say which of both a
        model was trained with before there is one."""
        pairs = list(zip(self.starts, map(len, self.segments), strict=True))
        if self.aligned:
            return torch.cat([at_origin(grid_positions((length, 1, 1), (start, 0, 0))) for start, length in pairs])
        doubled = [
            torch.cat([grid_positions((padded(length), 1, 1), (start, 0, 0)), torch.zeros(missing(length), 3)])
            for start, length in pairs
        ]
        return torch.cat(doubled)[: sum(padded(length) for _, length in pairs)]

    def feature_positions(self) -> Tensor:
        """[tokens, 3], of the features with their pad tokens, those in the place of the image's included: spread over
        the pixels of the latent, rounded down."""
        found = [torch.zeros(SEQUENCE_MULTIPLE, 3)]
        for plane, seen in reversed(list(zip(self.planes, self.seen, strict=False))):
            rows, columns, _ = seen.features.shape
            own = grid_positions((1, rows, columns), (plane + 1, 0, 0)).float()
            for axis, (count, pixels) in enumerate(zip((rows, columns), seen.latent.shape[1:], strict=True), start=1):
                own[:, axis] = own[:, axis] / max(count - 1, 1) * (pixels - 1)
            found.insert(0, at_origin(own.to(torch.int32)))
        return torch.cat(found)


@dataclass(frozen=True)
class OmniCaption(Caption):
    """tokens: those that the time takes for clean first. clean: how many; references: latents; planes: of these, and of
    the image."""

    clean: int
    references: tuple[Tensor, ...]
    planes: tuple[int, ...]

    @property
    def layout(self) -> Hashable:
        return len(self.tokens), self.planes, tuple(latent.shape for latent in self.references)


@dataclass(frozen=True)
class OmniModulation(Modulation):
    """clean: what the time does to what has no noise."""

    clean: Modulation

    def to(self, device: torch.device) -> OmniModulation:
        plain = super().to(device)
        return OmniModulation(plain.noise_refiner, plain.layers, plain.final, self.clean.to(device))


class OmniTransformer(Transformer):
    """The skeleton, under diffusers' names."""

    def __init__(self, config: OmniConfig, compute: Compute = REFERENCE) -> None:
        super().__init__(config, compute)
        self.siglip_embedder = nn.ModuleList(
            [RMSNorm(config.siglip_feat_dim, config.norm_eps), Linear(config.siglip_feat_dim, config.dim, bias=True)]
        )
        self.siglip_refiner = nn.ModuleList([Block(config, modulated=False) for _ in range(config.n_refiner_layers)])
        self.siglip_pad_token = nn.Parameter(torch.empty(1, config.dim, device="meta"), requires_grad=False)

    def refine_captions(self, features: Sequence[Tensor | Told], stream: Stream = iter) -> list[Caption]:
        """A tensor is a prompt without references."""
        told = [Told([one]) if isinstance(one, Tensor) else one for one in features]
        texts = self._refined_texts(told, stream)
        looks = iter(self._refined_features([one for one in told if one.seen], stream))
        return [
            self._caption(one, *text, next(looks) if one.seen else None) for one, text in zip(told, texts, strict=True)
        ]

    def _refined_texts(self, told: Sequence[Told], stream: Stream) -> list[tuple[Tensor, Tensor]]:
        """Of each, [tokens, dim] and their positions."""
        norm, project = self.cap_embedder
        tokens = [[pad(project(norm(segment)), self.cap_pad_token) for segment in one.segments] for one in told]
        return self._refined(tokens, [one.positions() for one in told], stream(self.context_refiner))

    def _refined_features(self, told: Sequence[Told], stream: Stream) -> list[tuple[Tensor, Tensor]]:
        """The same of the references' features, with pad tokens in the place of the image's."""
        if not told:
            return []
        norm, project = self.siglip_embedder
        nothing = self.siglip_pad_token.expand(SEQUENCE_MULTIPLE, -1)
        tokens = [
            [*(pad(project(norm(mixed(own.features))), self.siglip_pad_token) for own in one.seen), nothing]
            for one in told
        ]
        return self._refined(tokens, [one.feature_positions() for one in told], stream(self.siglip_refiner))

    def _refined(
        self, tokens: Sequence[Sequence[Tensor]], positions: Sequence[Tensor], blocks: Iterable[nn.Module]
    ) -> list[tuple[Tensor, Tensor]]:
        lengths = [sum(map(len, own)) for own in tokens]
        x, rope = residual([part for own in tokens for part in own]), joined_ropes(list(map(self.rope, positions)))
        for block in blocks:
            x = block(x, rope, lengths, compute=self.compute)
        return list(zip(x.split(lengths), positions, strict=True))

    def _caption(self, told: Told, text: Tensor, places: Tensor, look: tuple[Tensor, Tensor] | None) -> OmniCaption:
        before = sum(padded(len(segment)) for segment in told.segments[: len(told.seen)])
        features, spots = look or (text[:0], places[:0])
        known = len(features) - SEQUENCE_MULTIPLE if look else 0
        tokens, positions = (
            torch.cat([a[:before], b[:known], a[before:], b[known:]]) for a, b in ((text, features), (places, spots))
        )
        references = tuple(seen.latent for seen in told.seen)
        return OmniCaption(tokens, self.rope(positions), before + known, references, tuple(told.planes))

    def modulations(self, times: Tensor, dtype: torch.dtype, stream: Stream = iter) -> list[Modulation]:
        *noisy, clean = super().modulations(torch.cat([times, torch.ones_like(times[:1])]), dtype, stream)
        return [OmniModulation(own.noise_refiner, own.layers, own.final, clean) for own in noisy]

    def embedded(self, latent: Tensor, caption: Caption) -> Tensor:
        assert isinstance(caption, OmniCaption)
        embedded = super().embedded
        return torch.cat([embedded(own, caption) for own in (latent, *caption.references)])

    def positions(self, latent: Tensor, caption: Caption) -> Tensor:
        assert isinstance(caption, OmniCaption)
        *planes, plane = caption.planes
        pairs = zip((latent, *caption.references), (plane, *planes), strict=True)
        return torch.cat([image_positions(*pair) for pair in pairs])

    def vectors(
        self, modulation: Modulation, latents: list[Tensor], captions: list[Caption]
    ) -> tuple[Iterable[Vectors], Iterable[Vectors]]:
        assert isinstance(modulation, OmniModulation)
        images, all_tokens = list[tuple[int, bool]](), list[tuple[int, bool]]()
        for latent, caption in zip(latents, captions, strict=True):
            assert isinstance(caption, OmniCaption)
            image = [(_tokens(latent), True), (sum(map(_tokens, caption.references)), False)]
            images += image
            all_tokens += [*image, (caption.clean, False), (len(caption.tokens) - caption.clean, True)]
        clean = modulation.clean
        return (
            list(_laid(images, modulation.noise_refiner, clean.noise_refiner)),
            list(_laid(all_tokens, modulation.layers, clean.layers)),
        )


def transformer(config: TransformerConfig, compute: Compute = REFERENCE) -> Transformer:
    """The skeleton of any transformer."""
    return OmniTransformer(config, compute) if isinstance(config, OmniConfig) else Transformer(config, compute)


def mixed(features: Tensor) -> Tensor:
    """[rows, columns, width] -> [rows * columns, width], as diffusers and ComfyUI hand them over: in the order of a
    [width, rows, columns] tensor, so that no row is what one patch became."""
    return features.permute(2, 0, 1).reshape(-1, features.shape[2])


def _tokens(latent: Tensor) -> int:
    return padded(latent[0].numel() // PATCH_SIZE**2)


def _laid(runs: Iterable[tuple[int, bool]], noisy: Tensor, clean: Tensor) -> Iterator[Vectors]:
    """Of each block. runs: so many tokens, with noise or without; as few as there can be."""
    merged = [
        (sum(length for length, _ in own), has_noise)
        for has_noise, own in groupby(filter(itemgetter(0), runs), itemgetter(1))
    ]
    for with_noise, without in zip(noisy, clean, strict=True):
        if len(merged) == 1:
            yield with_noise
        else:
            yield [(length, with_noise if has_noise else without) for length, has_noise in merged]
