"""Second moments of what linears are given, gathered while a model draws.

Of an input with rows x: for each channel the sum of squares, by quarter of the steps; and along the diagonal of
X^T X blocks of it, which tell how far the error of one column can be made up for by others. Linears that share an
input (q, k and v; w1 and w3) share its moments, under the name of the first.

Rows of what is not of an image, captions and pads, count so much that all of them in an evaluation have OTHERS of the
weight of its image, however many they are. In the demo, where they are three quarters of all rows, 2 % of the gradient
of what comes out passes through them (up to 30 % in keys and values, next to none in the feed-forwards), and pictures
of calibrated 2 to 4 bits are 1 to 2 dB nearer when they count a tenth than when all rows count alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

STEP_RANGES = 4
PIECE_VALUES = 2**22  # of an input that are float32 at a time: 16 MB
OTHERS = 0.1
AGAIN = "gather them again, with calibrate --overwrite"  # what to do with statistics that cannot be used
WEIGHING = {"others": OTHERS}  # what files say of it: sums that were weighed otherwise cannot be added to these

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
    """Of one input. counts: [STEP_RANGES] rows seen, as far as they count; squares: [STEP_RANGES, columns] their sums;
    both float64. products: [blocks, width, width] float32, sums of x^T x, if they are gathered."""

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

    def add(self, x: Tensor, step_range: int, weights: Tensor | None = None) -> None:
        """x: [rows, columns], on any device and in any float dtype; weights: [rows], what each counts, if not all 1.

        Sums leave the device once: 4224 rows of 10240 are 11 pieces, each with products of 52 MB."""
        rows, here = max(PIECE_VALUES // x.shape[1], 1), x.device.type == "cpu"
        squares, products = torch.zeros_like(self.squares[step_range], device=x.device), self.products
        if products is not None and not here:
            products = torch.zeros_like(products, device=x.device)
        roots = None if weights is None else weights.to(x.device).sqrt().unsqueeze(1)
        for start in range(0, len(x), rows):
            wide = x[start : start + rows].float()
            own = float(len(wide))
            if weights is not None and roots is not None:
                own = float(weights[start : start + rows].sum())
                wide = wide * roots[start : start + rows]
            self.counts[step_range] += own
            squares += wide.square().sum(0, dtype=torch.float64)
            if products is not None:
                blocks = wide.view(len(wide), -1, products.shape[1]).transpose(0, 1)
                products.baddbmm_(blocks.transpose(1, 2), blocks)
        self.squares[step_range] += squares.cpu()
        if self.products is not None and products is not None and not here:
            self.products += products.cpu()

    @property
    def mean_squares(self) -> Tensor:
        """[columns] float32, over all steps."""
        return (self.squares.sum(0) / self.counts.sum()).float()


@dataclass
class Statistics:
    """config: of the transformer, as plain data; settings: how it drew. inputs: by `input_of`."""

    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    prompts: list[str] = field(default_factory=list)
    inputs: dict[str, Moments] = field(default_factory=dict)

    def coverage(self) -> dict[str, Any]:
        """What was seen: rows of images by quarter of the steps, and of captions, which are the same in all."""
        images, captions = (self.inputs.get(name) for name in (_EMBEDDER, _CAPTION_EMBEDDER))
        if images is None or captions is None:
            return {"prompts": len(self.prompts)}
        return {
            "prompts": len(self.prompts),
            "image_tokens_by_step_quarter": [int(count) for count in images.counts],
            "image_tokens": int(images.counts.sum()),
            "caption_tokens": int(captions.counts.sum()),
        }


def row_weights(images: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """[rows] float32, of sequences one after another. images: rows of the image in each, which come first; lengths: all
    rows of each."""
    others = sum(lengths) - sum(images)
    weights = torch.full((sum(lengths),), OTHERS * sum(images) / max(others, 1))
    at = 0
    for image, length in zip(images, lengths, strict=True):
        weights[at : at + image] = 1
        at += length
    return weights


_EMBEDDER = "all_x_embedder.2-1.weight"
_CAPTION_EMBEDDER = "cap_embedder.1.weight"
