"""Second moments of what linears are given, gathered while a model draws.

Of an input with rows x: for each channel the sum of squares, by quarter of the steps; and along the diagonal of
X^T X blocks of it, which tell how far the error of one column can be made up for by others. Linears that share an
input (q, k and v; w1 and w3) share its moments, under the name of the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

STEP_RANGES = 4
PIECE_VALUES = 2**22  # of an input that are float32 at a time: 16 MB

_SHARED = {"attention.to_k": "attention.to_q", "attention.to_v": "attention.to_q", "feed_forward.w3": "feed_forward.w1"}


def input_of(weight: str) -> str:
    """The name under which a linear's input is kept. weight: canonical, "layers.0.attention.to_k.weight"."""
    for own, first in _SHARED.items():
        if weight.endswith(f".{own}.weight"):
            return weight.removesuffix(f"{own}.weight") + f"{first}.weight"
    return weight


def block_width(columns: int, wanted: int) -> int:
    """Columns of a block of X^T X: the whole row where it is not longer, or where blocks do not divide it."""
    return columns if columns <= wanted or columns % wanted else wanted


@dataclass
class Moments:
    """Of one input. counts: [STEP_RANGES] rows seen; squares: [STEP_RANGES, columns] their sums; both float64.
    products: [blocks, width, width] float32, sums of x^T x, if they are gathered."""

    counts: Tensor
    squares: Tensor
    products: Tensor | None = None

    @classmethod
    def empty(cls, columns: int, width: int = 0) -> Moments:
        """width: of the blocks of products; 0: none."""
        counts = torch.zeros(STEP_RANGES, dtype=torch.float64)
        squares = torch.zeros(STEP_RANGES, columns, dtype=torch.float64)
        if not width:
            return cls(counts, squares)
        width = block_width(columns, width)
        # Written to, so that the planner sees what it takes.
        return cls(counts, squares, torch.empty(columns // width, width, width).fill_(0))

    def add(self, x: Tensor, step_range: int) -> None:
        """x: [rows, columns], on any device and in any float dtype."""
        for piece in x.split(max(PIECE_VALUES // x.shape[1], 1)):
            wide = piece.float()
            self.counts[step_range] += len(wide)
            self.squares[step_range] += wide.square().sum(0, dtype=torch.float64).cpu()
            if self.products is not None:
                self.products += _products(wide, self.products.shape[1]).cpu()

    @property
    def mean_squares(self) -> Tensor:
        """[columns] float32, over all steps."""
        return (self.squares.sum(0) / self.counts.sum()).float()


def _products(x: Tensor, width: int) -> Tensor:
    """-> [columns / width, width, width]"""
    blocks = x.view(len(x), -1, width).transpose(0, 1)
    return torch.bmm(blocks.transpose(1, 2), blocks)


@dataclass
class Statistics:
    """config: of the transformer, as plain data; settings: how it drew. inputs: by `input_of`."""

    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    prompts: list[str] = field(default_factory=list)
    inputs: dict[str, Moments] = field(default_factory=dict)

    def coverage(self) -> dict[str, Any]:
        """What was seen: rows of images and captions in the layers, by quarter of the steps."""
        layers, images = (self.inputs.get(name) for name in ("layers.0.attention.to_q.weight", _EMBEDDER))
        if layers is None or images is None:
            return {"prompts": len(self.prompts)}
        tokens, of_images = layers.counts, images.counts
        return {
            "prompts": len(self.prompts),
            "tokens_by_step_quarter": [int(count) for count in tokens],
            "image_tokens": int(of_images.sum()),
            "other_tokens": int((tokens - of_images).sum()),
        }


_EMBEDDER = "all_x_embedder.2-1.weight"
