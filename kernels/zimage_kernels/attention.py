"""Full attention over several sequences that lie one after another in the same tensor.

Packing instead of padding: no mask is ever built, and sequences of different lengths cost what they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, separately for each sequence.

    q: [tokens, heads, head_dim]; k, v: [tokens, kv_heads, head_dim], any float dtype; heads a multiple of kv_heads.
    lengths: tokens of each sequence, sum(lengths) == tokens. Returns [tokens, heads, head_dim] in q's dtype.
    """
    out = []
    for q_i, k_i, v_i in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        q_i, k_i, v_i = (t.transpose(0, 1).unsqueeze(0) for t in (q_i, k_i, v_i))
        out_i = F.scaled_dot_product_attention(q_i, k_i, v_i, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        out.append(out_i.squeeze(0).transpose(0, 1))
    return torch.cat(out)
