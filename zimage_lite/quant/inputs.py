"""What is known of the inputs that a weight will be multiplied by."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor
from zimage_kernels import hadamard_rotate

DAMPING = 0.01  # of the mean square, added to all: what was seen is a sample


@dataclass(frozen=True)
class Inputs:
    """squares: [columns] float32, the mean square of each channel. hessian: [blocks, width, width] float32, the mean of
    x^T x in blocks along its diagonal, if it is known."""

    squares: Tensor
    hessian: Tensor | None = None
    _factors: dict[int, Tensor] = field(default_factory=dict, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False)

    def factor(self, group: int = 0) -> Tensor:
        """[blocks, width, width] float32, upper triangular: U of H^-1 = U^T U. group: of the inputs' rotation, 0 for
        none; blocks must hold whole groups."""
        assert self.hessian is not None
        with self._lock:
            if group not in self._factors:
                self._factors[group] = torch.stack([_factor(rotated(block, group)) for block in self.hessian])
            return self._factors[group]

    def rotates(self, group: int) -> bool:
        """Whether `factor` and `rotated` know inputs that are rotated so."""
        return self.hessian is not None and (not group or self.hessian.shape[1] % group == 0)

    def error(self, gap: Tensor) -> Tensor:
        """gap: [rows, columns], what weights are off by. -> [rows], the mean square of what comes out because of it."""
        if self.hessian is None:
            return gap.square() @ self.squares
        width = self.hessian.shape[1]
        blocks = gap.view(len(gap), -1, width).transpose(0, 1)
        return (torch.bmm(blocks, self.hessian) * blocks).sum((0, 2))


def rotated(hessian: Tensor, group: int) -> Tensor:
    """R^T H R, of inputs that are rotated by R, which is its own transpose."""
    if not group:
        return hessian
    return hadamard_rotate(hadamard_rotate(hessian, group).t().contiguous(), group)


def _factor(hessian: Tensor) -> Tensor:
    wide = hessian.double()
    level = wide.diagonal().mean()
    wide.diagonal().add_(DAMPING * level if level > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(wide))
    return torch.linalg.cholesky(inverse, upper=True).float()
