"""What is known of the inputs that a weight will be multiplied by."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from zimage_kernels import hadamard_rotate

DAMPING = 0.1  # of each mean square is added to it, as what was seen is a sample: channels go together less than there
LEAST = 1e-4  # of the mean over all channels, for those that were never seen to differ from zero


class Span(NamedTuple):
    """Columns of which it is known how they go together. hessian: [width, width] float32, the mean of x^T x; damping:
    [width], what is added to its diagonal, H then; factor: [width, width] float32, upper triangular U of
    H^-1 = U^T U."""

    hessian: Tensor
    damping: Tensor
    factor: Tensor


@dataclass(frozen=True)
class Inputs:
    """squares: [columns] float32, the mean square of each channel. hessian: [blocks, width, width] float32, the mean of
    x^T x in blocks along its diagonal, if it is known."""

    squares: Tensor
    hessian: Tensor | None = None
    _factors: list[tuple[Tensor, Tensor]] = field(default_factory=list, compare=False)  # of each block
    _rotated: dict[int, Inputs] = field(default_factory=dict, compare=False)  # by group
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False)

    def spans(self, size: int) -> Iterator[Span]:
        """From the first column on, each of whole blocks of so many columns."""
        assert self.hessian is not None
        with self._lock:
            if not self._factors:
                self._factors.extend(map(_factor, self.hessian))
        together = math.lcm(size, self.hessian.shape[1]) // self.hessian.shape[1]
        known = [Span(block, *own) for block, own in zip(self.hessian, self._factors, strict=True)]
        for at in range(0, len(known), together):
            if together == 1:
                yield known[at]
                continue
            hessians, dampings, factors = zip(*known[at : at + together], strict=True)
            yield Span(torch.block_diag(*hessians), torch.cat(dampings), torch.block_diag(*factors))

    def rotated(self, group: int) -> Inputs:
        """Of x R for weights W R, with R ConvRot's rotation of so many columns: H becomes R H R, in blocks that hold
        whole groups. Where only the mean squares are known it is taken that channels do not go together; after the
        rotation they do."""
        with self._lock:
            if group not in self._rotated:
                hessian = self.squares.view(-1, group).diag_embed() if self.hessian is None else self.hessian
                hessian = hadamard_rotate(_joined(hessian, group), group)
                hessian = hadamard_rotate(hessian.transpose(1, 2).contiguous(), group)
                self._rotated[group] = Inputs(hessian.diagonal(dim1=1, dim2=2).flatten().clamp(min=0), hessian)
            return self._rotated[group]

    def times(self, x: Tensor) -> Tensor:
        """x: [rows, columns] float32 -> x H."""
        if self.hessian is None:
            return x * self.squares.to(x.device)
        blocks = x.view(len(x), -1, self.hessian.shape[1]).transpose(0, 1)
        return torch.bmm(blocks, self.hessian.to(x.device)).transpose(0, 1).reshape(x.shape)

    def error(self, gap: Tensor) -> Tensor:
        """gap: [rows, columns], what weights are off by. -> [rows], the mean square of what comes out because of it."""
        return (self.times(gap) * gap).sum(1)


def _joined(hessian: Tensor, group: int) -> Tensor:
    """The same in blocks of whole groups, with zeros between those that were joined."""
    together = math.lcm(hessian.shape[1], group) // hessian.shape[1]
    if together == 1:
        return hessian
    return torch.stack([torch.block_diag(*hessian[at : at + together]) for at in range(0, len(hessian), together)])


def _factor(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """-> damping and U."""
    wide = hessian.double()
    squares = wide.diagonal()
    damping = DAMPING * squares + (LEAST * squares.mean() or 1.0)
    wide.diagonal().add_(damping)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(wide))
    return damping.float(), torch.linalg.cholesky(inverse, upper=True).float()
