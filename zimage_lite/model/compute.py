"""How the blocks of the transformer compute: with which kernels, and in how many bits.

The same block code serves all. What flows between its parts is an activation: 16-bit (float32 where that is computed
in), or rotated int8 with a scale for each row, 4 times as fast to multiply. Whoever makes one asks `group` what its
consumers accept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from zimage_kernels import (
    Int8Rows,
    adds_faster_in_float16,
    attention,
    attention_int8,
    flash_attention,
    has_matrix_units,
    norm_rope,
    quantize_rows,
)

from .linear import Activation, Linear, RMSNorm
from .rope import Rope

HEAD_DIM = 128  # of the attention kernels
_HEAD_GROUP = 64  # queries and keys are rotated by halves of a head: 128 is no power of 4


@dataclass(frozen=True)
class Compute:
    """backend: of every op; with triton, torch still multiplies and attends where Triton has no matrix units. int8:
    multiply in 8 bits where a weight is int8; else weights are unpacked."""

    backend: Literal["triton", "reference"] = "reference"
    int8: bool = False

    def group(self, *consumers: Linear) -> int | None:
        """The rotation group of the 8-bit rows that all of these linears take; None: they are given 16 bits."""
        groups = {linear.group for linear in consumers} if self.int8 else set()
        return groups.pop() if len(groups) == 1 else None

    def accepted(self, x: Tensor, consumer: Linear) -> Activation:
        """x: [tokens, features], as the consumer takes it."""
        group = self.group(consumer)
        return x if group is None else quantize_rows(x, group, self.backend)

    def half_sums(self, out: Linear, q: Tensor) -> bool:
        """Whether products with v, of q attending in 8 bits, are added up in float16, a tile at a time: where the GPU
        does that at twice the rate, and `out` takes back in its own scale what v was made smaller by."""
        fast = self.backend == "triton" and adds_faster_in_float16(q.device)
        return fast and q.dtype != torch.float32 and self.group(out) is not None

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, norms: tuple[RMSNorm, RMSNorm], rope: Rope, lengths: list[int],
        int8: bool, half_sums: bool = False,
    ) -> Tensor:  # fmt: skip
        """q, k, v: [tokens, heads, head_dim] as projected; norms: of q and k. int8: multiply q and k in 8 bits, unless
        they are float32, or torch has to attend because Triton has no matrix units. half_sums: as the method says; v
        comes in float16 then, times VALUE_SCALE. Returns [tokens, heads, head_dim].
        """
        (q_norm, k_norm), backend = norms, self.backend
        kernels = backend == "triton" and has_matrix_units(q.device)
        int8 = int8 and q.dtype != torch.float32 and (kernels or backend == "reference")
        group = _HEAD_GROUP if int8 else None
        q_in = norm_rope(q, q_norm.weight, *rope, q_norm.eps, group, None, backend)
        k_in = norm_rope(k, k_norm.weight, *rope, k_norm.eps, group, lengths if int8 else None, backend)
        if isinstance(q_in, Int8Rows) and isinstance(k_in, Int8Rows):
            return attention_int8(*q_in, *k_in, v, lengths, half_sums, backend)
        assert isinstance(q_in, Tensor) and isinstance(k_in, Tensor)
        if not kernels or q.dtype == torch.float32:
            return attention(q_in, k_in, v, lengths)
        return flash_attention(q_in, k_in, v, lengths, backend)


REFERENCE = Compute()
