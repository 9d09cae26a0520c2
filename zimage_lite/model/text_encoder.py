"""Qwen3 as far as Z-Image needs it: the residual stream before the last layer, without the final norm.

The embedding table is not part of the model: the few rows that a prompt needs are read from the file. The last layer
and the final norm are never run, so they are never asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from zimage_kernels import Backend, apply_rope, attention

from ..config import TextEncoderConfig
from .float16 import ATTENTION_SCALE, FEED_FORWARD_SCALE, scale_in, scaled, stream_dtype, swiglu
from .linear import Linear, RMSNorm, Stream
from .rope import Rope, rope_angles


class SelfAttention(nn.Module):
    """Grouped-query attention with normalised queries and keys. In float16 its result is ATTENTION_SCALE times as
    large."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        q_dim, kv_dim = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj, self.o_proj = Linear(hidden, q_dim), Linear(q_dim, hidden)
        self.k_proj, self.v_proj = Linear(hidden, kv_dim), Linear(hidden, kv_dim)
        self.q_norm, self.k_norm = (RMSNorm(self.head_dim, config.rms_norm_eps) for _ in range(2))

    def forward(self, x: Tensor, rope: Rope, lengths: list[int], backend: Backend) -> Tensor:
        q, k, v = (
            project(x, backend=backend).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (apply_rope(h, *rope, interleaved=False) for h in (self.q_norm(q), self.k_norm(k)))
        mixed = scaled(attention(q, k, v, lengths, causal=True).flatten(1), ATTENTION_SCALE)
        return self.o_proj(mixed, backend=backend)


class MLP(nn.Module):
    """SwiGLU. In float16 its result is FEED_FORWARD_SCALE times as large."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj, self.down_proj = (
            Linear(hidden, inner),
            Linear(hidden, inner),
            Linear(inner, hidden),
        )

    def forward(self, x: Tensor, backend: Backend) -> Tensor:
        hidden = swiglu(self.gate_proj(x, backend=backend), self.up_proj(x, backend=backend))
        return self.down_proj(hidden, backend=backend)


class Layer(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = SelfAttention(config), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: Rope, lengths: list[int], backend: Backend = "reference") -> Tensor:
        h = self.self_attn(self.input_layernorm(x), rope, lengths, backend)
        x = torch.add(x, h, alpha=1 / scale_in(h.dtype, ATTENTION_SCALE))
        h = self.mlp(self.post_attention_layernorm(x), backend)
        return torch.add(x, h, alpha=1 / scale_in(h.dtype, FEED_FORWARD_SCALE))


class TextEncoder(nn.Module):
    """The skeleton. backend: that unpacks its weights; at some fifty tokens there is nothing else worth a kernel."""

    def __init__(self, config: TextEncoderConfig, backend: Backend = "reference") -> None:
        super().__init__()
        self.config, self.backend = config, backend
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.layers_used)])

    def forward(self, embeddings: Tensor, lengths: list[int], stream: Stream = iter) -> list[Tensor]:
        """embeddings: [tokens, hidden] in the compute dtype, the prompts one after another without padding;
        lengths: tokens of each prompt. Returns [length, hidden] for each, in the same dtype, but float32 where that
        is float16: massive activations are part of the features."""
        positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(1)
        cos, sin = rope_angles(positions, (self.config.head_dim,), self.config.rope_theta)
        rope = cos.to(embeddings.device), sin.to(embeddings.device)
        x = embeddings.to(stream_dtype(embeddings.dtype))
        for layer in stream(self.layers):
            x = layer(x, rope, lengths, self.backend)
        return list(x.split(lengths))
