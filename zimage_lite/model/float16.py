"""What keeps float16 finite, for cards without bfloat16. With any other dtype nothing here changes a bit.

float16 ends at 65504. In this family three values go beyond it: the output of an attention layer, the product inside
SwiGLU, and the sum of all blocks, the residual stream. So the stream is float32, which costs memory but no products;
and what the two output projections read is multiplied by a power of two, which is exact, so that what they give is
smaller by as much, whatever format their weight has. In the S3-DiT an RMSNorm follows, which cancels the factor if its
eps is multiplied by the factor's square; in Qwen3 the sum with the stream divides by it. The factors are those that
stable-diffusion.cpp uses for this model.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ATTENTION_SCALE = 2.0**-4
FEED_FORWARD_SCALE = 2.0**-7
# Of v where its products are added up in float16 (`Compute.half_sums`): sums of 128 keys hold |v| up to 2^13, and v is
# rounded more finely than in bfloat16 down to 2^-12. Beyond 2^13 the sums are infinite, which is told.
VALUE_SCALE = 2.0**-4

_PIECE_VALUES = 2**20  # of the product that are float32 at a time: 4 MB each for both of its factors


def stream_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the residual stream, where linears compute in `dtype`."""
    return torch.float32 if dtype == torch.float16 else dtype


def scale_in(dtype: torch.dtype, scale: float) -> float:
    """The factor that is in force where linears compute in `dtype`."""
    return scale if dtype == torch.float16 else 1.0


def log2_in(dtype: torch.dtype, scale: float) -> int:
    """Its binary logarithm."""
    return round(math.log2(scale_in(dtype, scale)))


def scaled(x: Tensor, scale: float) -> Tensor:
    """x times the factor that is in force in its dtype. Overwrites x."""
    return x.mul_(scale) if x.dtype == torch.float16 else x


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, in float16 times FEED_FORWARD_SCALE. gate, up: [tokens, hidden]; gate may be overwritten."""
    if gate.dtype != torch.float16:
        return F.silu(gate).mul_(up)
    rows = max(_PIECE_VALUES // gate.shape[1], 1)
    for some, others in zip(gate.split(rows), up.split(rows), strict=True):
        some.copy_(F.silu(some.float()).mul_(others.float()).mul_(FEED_FORWARD_SCALE))
    return gate
