"""The S3-DiT of Z-Image: caption and image in one stream of tokens, 30 equal blocks.

    caption features -> embed, pad -> context refiner -.
                                                        >- [image, caption] -> blocks -> final layer -> image patches
    latents -> patches -> embed, pad -> noise refiner -'

Several sequences (a batch, or the two sides of guidance) lie one after another in the same [tokens, dim] tensor, so
that every weight is used once for all of them; only attention looks at the borders.

What the time does to the blocks depends on nothing else, so it is computed for all steps before the first one, and the
weights that it takes (`is_time_weight`), 2 % of all, are not needed afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zimage_kernels import Branch, Int8Rows, Norm, Normed, add_norm, swiglu_int8

from ..config import PATCH_SIZE, BlockSizes, TransformerConfig
from .compute import REFERENCE, Compute
from .float16 import ATTENTION_SCALE, FEED_FORWARD_SCALE, VALUE_SCALE, log2_in, swiglu
from .linear import Activation, Linear, RMSNorm, Stream
from .rope import Rope, grid_positions, rope_angles
from .tokens import (
    image_positions,
    interleaved,
    joined_ropes,
    pad,
    patchify,
    residual,
    unpatchify,
)

_TIME_FREQUENCIES = 256
_TIME_HIDDEN = 1024

Watch = Callable[[str, Tensor], None]  # the name of a block or other part, what came out of it
Ropes = tuple[Rope, Rope]  # of the images alone, and of each with its caption behind it
# What the time does to a block, [4, dim]: to all tokens alike, or to so many after each other.
Vectors = Tensor | Sequence[tuple[int, Tensor]]


class Attention(nn.Module):
    """With normalised queries and keys. In float16 its result is ATTENTION_SCALE times as large."""

    def __init__(self, dim: int, n_heads: int, eps: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.to_q, self.to_k, self.to_v = (Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([Linear(dim, dim)])
        self.norm_q, self.norm_k = (RMSNorm(dim // n_heads, eps) for _ in range(2))

    def forward(self, x: Activation, rope: Rope, lengths: list[int], compute: Compute) -> Tensor:
        norms, out, backend = (self.norm_q, self.norm_k), cast(Linear, self.to_out[0]), compute.backend
        q, k = (project(x, backend=backend) for project in (self.to_q, self.to_k))
        half_sums = isinstance(x, Int8Rows) and compute.half_sums(out, q)
        scale_log2 = round(math.log2(VALUE_SCALE)) if half_sums else 0  # of v, and so of what is mixed
        v = self.to_v(x, scale_log2, backend, torch.float16 if half_sums else None)
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)) for part in (q, k, v))
        mixed = compute.attention(q, k, v, norms, rope, lengths, isinstance(x, Int8Rows), half_sums).flatten(1)
        return out(compute.accepted(mixed, out), log2_in(q.dtype, ATTENTION_SCALE) - scale_log2, backend)


class FeedForward(nn.Module):
    """SwiGLU. In float16 its result is FEED_FORWARD_SCALE times as large."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = Linear(dim, hidden), Linear(hidden, dim), Linear(dim, hidden)

    def forward(self, x: Activation, compute: Compute) -> Tensor:
        return self.w2(compute.accepted(self._hidden(x, compute), self.w2), backend=compute.backend)

    def _hidden(self, x: Activation, compute: Compute) -> Tensor:
        if not isinstance(x, Int8Rows):
            return swiglu(self.w1(x, backend=compute.backend), self.w3(x, backend=compute.backend))
        dtype, backend = self.w1.dtype, compute.backend
        scale_log2 = log2_in(dtype, FEED_FORWARD_SCALE)
        if not (self.w1.rides and self.w3.rides):
            return swiglu(self.w1(x, backend=backend), self.w3(x, backend=backend))
        weights = (*self.w1.scaled_rows, *self.w3.scaled_rows)
        low_rank = self.w1.low_rank(x, backend), self.w3.low_rank(x, backend)
        return swiglu_int8(*x, *weights, *low_rank, scale_log2, dtype, backend)


class Block(nn.Module):
    """Attention and feed-forward, each between two norms. With modulation, the time scales what goes in (1 + s) and
    gates what comes out (tanh g); the context refiner has none."""

    def __init__(self, config: BlockSizes, modulated: bool = True) -> None:
        super().__init__()
        dim, eps = config.dim, config.norm_eps
        self.attention = Attention(dim, config.n_heads, eps)
        self.feed_forward = FeedForward(dim, config.ffn_dim)
        self.attention_norm1, self.attention_norm2 = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.ffn_norm1, self.ffn_norm2 = RMSNorm(dim, eps), RMSNorm(dim, eps)
        if modulated:
            self.adaLN_modulation = nn.ModuleList([Linear(config.conditioning_dim, 4 * dim, bias=True)])

    def forward(
        self, x: Tensor, rope: Rope, lengths: list[int], modulation: Vectors | None = None, compute: Compute = REFERENCE
    ) -> Tensor:
        """x: [tokens, dim], the residual stream; modulation: [4, dim], one row of what `modulation` returns.

        One pass adds what the attention gave and norms the sum for the feed-forward."""
        attention, feed_forward, backend = self.attention, self.feed_forward, compute.backend

        def begin(x: Tensor, _: None, vectors: Any) -> Normed:
            return add_norm(x, None, _norm(self.attention_norm1, vectors[0]), group, backend)

        def between(x: Tensor, h: Tensor, vectors: Any) -> Normed:
            branch = _branch(h, self.attention_norm2, vectors[1], ATTENTION_SCALE)
            return add_norm(x, branch, _norm(self.ffn_norm1, vectors[2]), group, backend)

        def end(x: Tensor, h: Tensor, vectors: Any) -> Normed:
            return add_norm(x, _branch(h, self.ffn_norm2, vectors[3], FEED_FORWARD_SCALE), None, None, backend)

        group = compute.group(attention.to_q, attention.to_k, attention.to_v)
        _, h = by_runs(begin, x, None, modulation)
        mixed = attention(h, rope, lengths, compute)

        group = compute.group(feed_forward.w1, feed_forward.w3)
        x, h = by_runs(between, x, mixed, modulation)
        h = feed_forward(h, compute)

        return by_runs(end, x, h, modulation).x

    def modulation(self, condition: Tensor) -> Tensor:
        """condition: [times, conditioning_dim], embedded times. -> [times, 4, dim]: scale and gate of the attention,
        then of the feed-forward, ready to multiply by."""
        scale_attn, gate_attn, scale_ffn, gate_ffn = self.adaLN_modulation[0](condition).chunk(4, dim=-1)
        return torch.stack((1.0 + scale_attn, gate_attn.tanh(), 1.0 + scale_ffn, gate_ffn.tanh()), dim=1)


def by_runs(step: Callable[..., Normed], x: Tensor, h: Tensor | None, modulation: Vectors | None) -> Normed:
    """step(x, h, vectors), once where the time does the same to all tokens, else for each run of them."""
    if modulation is None or isinstance(modulation, Tensor):
        return step(x, h, (None,) * 4 if modulation is None else modulation)
    runs = [length for length, _ in modulation]
    hs = [None] * len(runs) if h is None else h.split(runs)
    parts = zip(x.split(runs), hs, (vectors for _, vectors in modulation), strict=True)
    xs, hs = zip(*(step(*part) for part in parts), strict=True)
    return Normed(x if h is None else torch.cat(xs), _joined(hs))


def _joined(parts: Sequence[Any]) -> Any:
    """Activations of runs as one; None where none was asked for."""
    if parts[0] is None:
        return None
    if isinstance(parts[0], Int8Rows):
        return Int8Rows(*map(torch.cat, zip(*parts, strict=True)))
    return torch.cat(list(parts))


def _norm(norm: RMSNorm, scale: Tensor | None) -> Norm:
    return Norm(norm.weight, scale, norm.eps)


def _branch(y: Tensor, norm: RMSNorm, gate: Tensor | None, scale: float) -> Branch:
    """scale: of y in float16."""
    return Branch(y, norm.weight, gate, norm.eps, log2_in(y.dtype, scale))


class TimeEmbedder(nn.Module):
    def __init__(self, out_dim: int) -> None:
        super().__init__()
        first = Linear(_TIME_FREQUENCIES, _TIME_HIDDEN, bias=True)
        self.mlp = nn.ModuleList([first, nn.SiLU(), Linear(_TIME_HIDDEN, out_dim, bias=True)])

    def forward(self, t: Tensor) -> Tensor:
        """t: [times] float32 -> [times, out_dim] float32: 128 cosines, then 128 sines, then an MLP."""
        half = _TIME_FREQUENCIES // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t[:, None] * torch.exp(-math.log(10000) * steps / half)
        h = torch.cat([angles.cos(), angles.sin()], dim=-1)
        for layer in self.mlp:
            h = layer(h)
        return h


class FinalLayer(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.linear = Linear(config.dim, config.patch_dim, bias=True)
        self.adaLN_modulation = nn.ModuleList([nn.SiLU(), Linear(config.conditioning_dim, config.dim, bias=True)])

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """x: [tokens, dim], the residual stream; scale: [dim], one row of what `modulation` returns."""
        return self.linear((F.layer_norm(x, x.shape[-1:], eps=1e-6) * scale).to(scale.dtype))

    def modulation(self, condition: Tensor) -> Tensor:
        """condition: [times, conditioning_dim], embedded times. -> [times, dim], to multiply the normed input by."""
        return 1.0 + self.adaLN_modulation[1](self.adaLN_modulation[0](condition))


@dataclass(frozen=True)
class Modulation:
    """All that a step needs to know of its time. noise_refiner, layers: [blocks, 4, dim], see `Block.modulation`;
    final: [dim], see `FinalLayer.modulation`."""

    noise_refiner: Tensor
    layers: Tensor
    final: Tensor

    def to(self, device: torch.device) -> Modulation:
        return Modulation(self.noise_refiner.to(device), self.layers.to(device), self.final.to(device))


def is_time_weight(name: str) -> bool:
    """Whether a weight serves `Transformer.modulations` alone. name: in the transformer or in one of its blocks."""
    return name.startswith("t_embedder.") or "adaLN_modulation" in name.split(".")


@dataclass(frozen=True)
class Caption:
    """A prompt, refined once and used in every step. tokens: [length, dim], length a multiple of 32, in the dtype of
    the residual stream."""

    tokens: Tensor
    rope: Rope

    @property
    def layout(self) -> Hashable:
        """Equal for those that put their image at the same places."""
        return len(self.tokens)


class Beside:
    """What goes along with an evaluation and adds to the residual stream: here, nothing (a ControlNet's is
    `controlnet.Control`)."""

    def along(self, group: str, x: Tensor, rope: Rope, lengths: list[int], stream: Stream) -> Stream:
        """What brings the blocks of "noise_refiner", then of "layers". Those beside them come by the same `stream`, in
        between, and compute when they come: so that all are visited in one order, and one is bound at a time.
        x: [tokens, dim], the residual stream before the group."""
        return stream

    def added(self, x: Tensor) -> Tensor:
        """x: the residual stream after the block that was brought last. It may be overwritten."""
        return x


class Transformer(nn.Module):
    """The skeleton, under diffusers' names, in which "2-1" is the patch size in space and time. compute: of its
    blocks."""

    def __init__(self, config: TransformerConfig, compute: Compute = REFERENCE) -> None:
        super().__init__()
        self.config, self.compute = config, compute
        patch = f"{PATCH_SIZE}-1"
        self.all_x_embedder = nn.ModuleDict({patch: Linear(config.patch_dim, config.dim, bias=True)})
        self.all_final_layer = nn.ModuleDict({patch: FinalLayer(config)})
        self.t_embedder = TimeEmbedder(config.conditioning_dim)
        self.cap_embedder = nn.ModuleList(
            [RMSNorm(config.cap_feat_dim, config.norm_eps), Linear(config.cap_feat_dim, config.dim, bias=True)]
        )
        self.x_pad_token, self.cap_pad_token = (
            nn.Parameter(torch.empty(1, config.dim, device="meta"), requires_grad=False) for _ in range(2)
        )
        self.noise_refiner = nn.ModuleList([Block(config) for _ in range(config.n_refiner_layers)])
        self.context_refiner = nn.ModuleList([Block(config, modulated=False) for _ in range(config.n_refiner_layers)])
        self.layers = nn.ModuleList([Block(config) for _ in range(config.n_layers)])

    def refine_captions(self, features: list[Tensor], stream: Stream = iter) -> list[Caption]:
        """features: [length, cap_feat_dim] each, the text encoder's output -> captions. Does not depend on time.

        Computes in the dtype of the weights, whatever that of the features is."""
        norm, project = self.cap_embedder
        captions = [pad(project(norm(feature)), self.cap_pad_token) for feature in features]
        lengths = [len(caption) for caption in captions]
        # A caption's tokens, pads included, count up along the first axis from 1.
        ropes = [self.rope(grid_positions((length, 1, 1), (1, 0, 0))) for length in lengths]
        x, rope = residual(captions), joined_ropes(ropes)
        del captions
        for block in stream(self.context_refiner):
            x = block(x, rope, lengths, compute=self.compute)
        return [Caption(tokens, own) for tokens, own in zip(x.split(lengths), ropes, strict=True)]

    def modulations(self, times: Tensor, dtype: torch.dtype, stream: Stream = iter) -> list[Modulation]:
        """times: [T] float32, 1 - sigma of each step: 0 is pure noise. -> what each step takes, in `dtype`, which is
        the one that `forward` will compute in, on the device of times.

        Computed in float32 and with nothing but the time weights, which must be bound: those of a block when it is
        yielded by `stream`, which gets all blocks that know the time, the others at once.
        """
        condition = self.condition(times)
        blocks: Any = stream([*self.noise_refiner, *self.layers])
        vectors = torch.stack([block.modulation(condition).to(dtype) for block in blocks], dim=1)
        refiner, layers = vectors.split((len(self.noise_refiner), len(self.layers)), dim=1)
        final = _only(self.all_final_layer).modulation(condition).to(dtype)
        return [Modulation(*step) for step in zip(refiner, layers, final, strict=True)]

    def condition(self, times: Tensor) -> Tensor:
        """[T] -> [T, conditioning_dim] float32, from which all modulations are made."""
        return self.t_embedder(times * self.config.t_scale)

    def forward(
        self,
        latents: list[Tensor],
        captions: list[Caption],
        modulation: Modulation,
        stream: Stream = iter,
        watch: Watch | None = None,
        ropes: Ropes | None = None,
        beside: Beside | None = None,
    ) -> list[Tensor]:
        """One evaluation for one or several images at the same time.

        latents: [channels, height, width] each, in the compute dtype, height and width even. modulation: of that time,
        in the same dtype. watch: called after each part with its name ("embedder", "noise_refiner.0", "layers.17",
        "final layer") and its output. ropes: of these latents and captions, where they are at hand. beside: a
        ControlNet's part in it.
        Returns data - noise, the negated flow velocity, in the shapes of latents.
        """
        watch, beside = watch or _look_away, beside or Beside()
        final = _only(self.all_final_layer)
        images = [self.embedded(*pair) for pair in zip(latents, captions, strict=True)]
        of_images, of_all = ropes or self.ropes(latents, captions)
        lengths = [len(image) for image in images]
        of_refiner, of_layers = self.vectors(modulation, latents, captions)
        x = residual(images)
        del images
        watch("embedder", x)
        along = beside.along("noise_refiner", x, of_images, lengths, stream)
        for i, (block, vectors) in enumerate(zip(along(self.noise_refiner), of_refiner, strict=True)):
            x = beside.added(block(x, of_images, lengths, vectors, self.compute))
            watch(f"noise_refiner.{i}", x)

        told = [caption.tokens for caption in captions]
        x = interleaved(x.split(lengths), told)
        lengths = [image + len(tokens) for image, tokens in zip(lengths, told, strict=True)]
        along = beside.along("layers", x, of_all, lengths, stream)
        for i, (block, vectors) in enumerate(zip(along(self.layers), of_layers, strict=True)):
            x = beside.added(block(x, of_all, lengths, vectors, self.compute))
            watch(f"layers.{i}", x)
        tokens = final(x, modulation.final)
        watch("final layer", tokens)
        return [unpatchify(own, latent.shape) for own, latent in zip(tokens.split(lengths), latents, strict=True)]

    def embedded(self, latent: Tensor, caption: Caption) -> Tensor:
        """-> [tokens, dim], those of the latent first."""
        return pad(_only(self.all_x_embedder)(patchify(latent)), self.x_pad_token)

    def vectors(
        self, modulation: Modulation, latents: list[Tensor], captions: list[Caption]
    ) -> tuple[Iterable[Vectors], Iterable[Vectors]]:
        """For each block of the noise refiner, and each of the layers."""
        return modulation.noise_refiner, modulation.layers

    def ropes(self, latents: list[Tensor], captions: list[Caption]) -> Ropes:
        """What `forward` turns queries and keys by. The same in every step: made once, it spares 4 to 24 ms a step on
        two threads (1024x1024 to 2048x2048), in which a GPU would wait."""
        images = [self.rope(self.positions(*pair)) for pair in zip(latents, captions, strict=True)]
        parts = [part for pair in zip(images, (c.rope for c in captions), strict=True) for part in pair]
        return joined_ropes(images), joined_ropes(parts)

    def rope(self, positions: Tensor) -> Rope:
        """positions: [tokens, 3]"""
        cos, sin = rope_angles(positions, self.config.axes_dims, self.config.rope_theta)
        return cos.to(self.x_pad_token.device), sin.to(self.x_pad_token.device)

    def positions(self, latent: Tensor, caption: Caption) -> Tensor:
        """Of what is `embedded`: the image lies on one plane after its caption."""
        return image_positions(latent, len(caption.tokens) + 1)


def _only(modules: nn.ModuleDict) -> Any:
    """There is one patch size."""
    (module,) = modules.values()
    return module


def _look_away(name: str, output: Tensor) -> None:
    pass
