"""What a few directions can put right of what weights are off by."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import Inputs
from .pieces import row_pieces

_MORE = 8  # directions than are wanted
_ROUNDS = 4  # of subspace iteration: what is left over is then within 1 % of the least, of flat spectra as well


class LowRank(NamedTuple):
    """up: [rows, rank], down: [rank, columns], float32. before, after: the sums over rows of the mean square of what
    comes out because of the gap, without and with them."""

    up: Tensor
    down: Tensor
    before: float
    after: float


def low_rank(gap: Tensor, inputs: Inputs, rank: int) -> LowRank:
    """The update up @ down of that rank after which least of the gap E comes out, tr (E - up down) H (E - up down)^T.

    gap: [rows, columns], any float dtype. The best up has the leading eigenvectors U of E H E^T, and to them belongs
    down = U^T E. They are found by subspace iteration from fixed random numbers (Halko et al., arXiv 0909.4061), which
    keeps no float32 matrix of the size of E."""
    rank = min(rank, *gap.shape)
    random = torch.randn(gap.shape[1], min(rank + _MORE, *gap.shape), generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(_times(gap, random.to(gap.device))).Q
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(_times(gap, inputs.times(_times_back(gap, basis)).t())).Q
    seen = _times_back(gap, basis)
    strength, turn = torch.linalg.eigh((inputs.times(seen) @ seen.t()).double())
    turn = turn[:, -rank:].float()
    up, down = basis @ turn, turn.t() @ seen
    before = sum(float(inputs.error(gap[piece].float()).sum()) for piece in row_pieces(*gap.shape))
    balance = (down.norm(dim=1) + 1e-30).sqrt()  # of either factor, so that neither is too small for 16 bits
    after = max(before - float(strength[-rank:].sum()), 0.0)
    return LowRank(up * balance, down / balance.unsqueeze(1), before, after)


def _times(gap: Tensor, x: Tensor) -> Tensor:
    """[rows, columns] @ [columns, k]"""
    return torch.cat([gap[piece].float() @ x for piece in row_pieces(*gap.shape)])


def _times_back(gap: Tensor, x: Tensor) -> Tensor:
    """x^T gap: [k, columns]. x: [rows, k]"""
    return sum((x[piece].t() @ gap[piece].float() for piece in row_pieces(*gap.shape)), x.new_zeros(()))
