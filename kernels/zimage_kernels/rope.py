"""Rotary position embedding, in the two pairings this model family needs.

The S3-DiT rotates adjacent elements (0,1), (2,3), ...; Qwen3 rotates halves (i, i + head_dim/2).
"""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = True) -> Tensor:
    """Rotate each pair of x by its token's angle (Su et al., 2021), computed in float32.

    x: [tokens, heads, head_dim]; cos, sin: [tokens, head_dim / 2] float32. Returns x's shape and dtype.
    """
    pairs = x.float().unflatten(-1, (-1, 2) if interleaved else (2, -1))
    axis = -1 if interleaved else -2
    a, b = pairs.unbind(axis)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), axis).flatten(-2).to(x.dtype)
