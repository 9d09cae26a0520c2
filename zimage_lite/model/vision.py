"""SigLIP2's vision tower (Tschannen et al., 2025), naflex: patches of any grid -> a feature for each.

    patches -> embed, add positions -> equal layers -> norm

The pooling head behind it is not part of this: an Omni wants what each patch became.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zimage_kernels import Backend, attention

from ..config import VisionConfig
from .float16 import ATTENTION_SCALE, FEED_FORWARD_SCALE, log2_in, scale_in, stream_dtype
from .linear import Linear, Stream

Grid = tuple[int, int]  # rows and columns of patches


class LayerNorm(nn.Module):
    """In float32. x: [..., dim] -> the same shape in the dtype of the weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.empty(dim, device="meta"), requires_grad=False) for _ in range(2))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.float(), x.shape[-1:], self.weight.float(), self.bias.float(), self.eps)
        return normed.to(self.weight.dtype)


class SelfAttention(nn.Module):
    """In float16 its result is ATTENTION_SCALE times as large."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(dim, dim, bias=True) for _ in range(4))

    def forward(self, x: Tensor, lengths: list[int], backend: Backend) -> Tensor:
        q, k, v = (
            project(x, backend=backend).unflatten(-1, (self.heads, -1))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = attention(q, k, v, lengths).flatten(1)
        return self.out_proj(mixed, log2_in(mixed.dtype, ATTENTION_SCALE), backend)


class MLP(nn.Module):
    """In float16 its result is FEED_FORWARD_SCALE times as large."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True)

    def forward(self, x: Tensor, backend: Backend) -> Tensor:
        hidden = F.gelu(self.fc1(x, backend=backend), approximate="tanh")
        return self.fc2(hidden, log2_in(hidden.dtype, FEED_FORWARD_SCALE), backend)


class Layer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.self_attn, self.mlp = SelfAttention(config), MLP(config)
        self.layer_norm1, self.layer_norm2 = LayerNorm(dim, eps), LayerNorm(dim, eps)

    def forward(self, x: Tensor, lengths: list[int], backend: Backend = "reference") -> Tensor:
        """x: [tokens, dim], the residual stream."""
        h = self.self_attn(self.layer_norm1(x), lengths, backend)
        x = torch.add(x, h, alpha=1 / scale_in(h.dtype, ATTENTION_SCALE))
        h = self.mlp(self.layer_norm2(x), backend)
        return torch.add(x, h, alpha=1 / scale_in(h.dtype, FEED_FORWARD_SCALE))


class Embeddings(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = Linear(config.patch_dim, config.hidden_size, bias=True)
        self.position_embedding = _Table(config.num_patches, config.hidden_size)

    def forward(self, patches: Tensor, grid: Grid, backend: Backend) -> Tensor:
        """patches: [rows * columns, patch_dim] -> [rows * columns, dim]."""
        return self.patch_embedding(patches, backend=backend) + self.position_embedding(grid)


class _Table(nn.Module):
    """Of a square of positions, one row each."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim, device="meta"), requires_grad=False)

    def forward(self, grid: Grid) -> Tensor:
        """As of a picture that is resized, bilinearly and with antialiasing where it shrinks: [rows * columns, dim]."""
        side, device = round(len(self.weight) ** 0.5), self.weight.device
        down, across = (_resizing(side, size).to(device) for size in grid)
        square = self.weight.float().view(side, side, -1)
        return torch.einsum("hi,wj,ijd->hwd", down, across, square).flatten(0, 1).to(self.weight.dtype)


def _resizing(side: int, size: int) -> Tensor:
    """[size, side] float32: how much of each of `side` values goes into each of `size`. A triangle as wide as two
    values of the coarser of both, whose middle lies where the new value's middle is among the old ones."""
    scale = side / size
    middles = (torch.arange(size, dtype=torch.float32) + 0.5) * scale - 0.5
    apart = (torch.arange(side, dtype=torch.float32) - middles[:, None]).abs()
    weights = (1 - apart / max(scale, 1.0)).clamp(min=0)
    return weights / weights.sum(-1, keepdim=True)


class VisionTower(nn.Module):
    """The skeleton, under transformers' names. backend: that unpacks its weights."""

    def __init__(self, config: VisionConfig, backend: Backend = "reference") -> None:
        super().__init__()
        self.config, self.backend = config, backend
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])}
        )
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, patches: list[Tensor], grids: list[Grid], stream: Stream = iter) -> list[Tensor]:
        """patches: [rows * columns, patch_dim] of each picture, in the compute dtype, values from -1 to 1; in a patch,
        channels run fastest. -> [rows, columns, dim] of each, in the same dtype."""
        pairs = zip(patches, grids, strict=True)
        x = torch.cat([self.embeddings(own, grid, self.backend) for own, grid in pairs])
        x, lengths = x.to(stream_dtype(x.dtype)), [len(own) for own in patches]
        for layer in stream(self.encoder["layers"]):  # type: ignore[arg-type]
            x = layer(x, lengths, self.backend)
        features = self.post_layernorm(x).split(lengths)
        return [own.unflatten(0, grid) for own, grid in zip(features, grids, strict=True)]
