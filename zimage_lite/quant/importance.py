"""What errors count where it is known how large each column's input is: ggml's weights with an importance matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .search import divide, ordered_sum, root

# Type -> the elements whose mean square is added to x^2 (0: of the whole row), and the factor before it.
_MIXED = {
    "q2_k": (256, 1), "q3_k": (256, 2), "q4_k": (256, 2), "q5_k": (256, 2), "iq4_xs": (256, 2), "iq4_nl": (32, 2),
    "q4_0": (0, 1), "q4_1": (0, 1), "q5_0": (0, 1), "q5_1": (0, 1),
}  # fmt: skip


class Importance(NamedTuple):
    """Of each weight, in the shape of the blocks. counted: the mean square of its input, which is what its squared
    error counts in what comes out; searched: what ggml's search weighs it by."""

    counted: Tensor
    searched: Tensor

    @classmethod
    def of(cls, name: str, x: Tensor, columns: Tensor, block: int) -> Importance:
        """name: ggml's type; x: [rows, columns] float32; columns: [columns] float32, their mean squares."""
        counted = columns.to(x.device).expand_as(x).contiguous()
        if name not in _MIXED:
            return cls(*(part.reshape(-1, block) for part in (counted, counted)))
        elements, factor = _MIXED[name]
        groups = x.reshape(-1, elements or x.shape[1])
        mean = factor * ordered_sum(groups * groups).unsqueeze(1)
        mean = mean / torch.full_like(mean, groups.shape[1])
        searched = counted * root(mean + groups * groups).view_as(x)
        return cls(counted.reshape(-1, block), searched.reshape(-1, block))


def share_scale(values: Tensor, weights: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """[blocks, sub-blocks] >= 0, each with a weight -> float16 scale, and integers up to `top`: where the largest is
    laid near `top` to the least weighted error, then one integer at a time where it fits the others best."""
    peak = values.amax(1, keepdim=True).clamp_(min=0)
    zero = peak < 1e-15

    def error(inverse: Tensor) -> Tensor:
        off = values - divide(1, inverse) * (inverse * values).round_().clamp_(max=top)
        return ordered_sum(weights * off * off).unsqueeze(1)

    inverse = divide(top, peak)
    best = error(inverse)
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        other = (torch.tensor(0.1, device=values.device) * step + top) / peak
        found = error(other)
        better = found < best
        best, inverse = torch.where(better, found, best), torch.where(better, other, inverse)
    codes = (inverse * values).nan_to_num_(0.0).round_().clamp_(max=top)
    scale, codes = _descended(values, weights, codes, top)
    return torch.where(zero, 0.0, scale).half().float(), torch.where(zero, 0.0, codes)


def _descended(values: Tensor, weights: Tensor, codes: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """-> [blocks, 1] and [blocks, sub-blocks]."""
    x, w, codes = (part.t().contiguous() for part in (values, weights, codes))
    sum_xl, sum_l2 = ordered_sum((w * x * codes).t()), ordered_sum((w * codes * codes).t())
    for _ in range(5):
        for i in range(len(x)):
            rest_xl, rest_l2 = sum_xl - w[i] * x[i] * codes[i], sum_l2 - w[i] * codes[i] * codes[i]
            new = (x[i] * rest_l2 / rest_xl).nan_to_num_(0.0).round_().clamp_(max=top)
            new_xl, new_l2 = rest_xl + w[i] * x[i] * new, rest_l2 + w[i] * new * new
            gains = new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2
            better = (rest_xl > 0) & (rest_l2 > 0) & (new != codes[i]) & gains
            codes[i] = torch.where(better, new, codes[i])
            sum_xl, sum_l2 = torch.where(better, new_xl, sum_xl), torch.where(better, new_l2, sum_l2)
    return torch.where(sum_l2 > 0, sum_xl / sum_l2, 0.0).unsqueeze(1), codes.t().contiguous()
