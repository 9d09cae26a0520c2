"""What adapters add to a linear while its weight stays as it is.

    y = z + U z + B (A x) + sum kron(w1, w2) x + D x + bias,    z = W (x + T x)

LoRA, LoHa and low-rank LoKr are A and B; full LoKr stays factored; D is a dense difference. T and U hold what DoRA and
OFT come to once the norms of their weights are known: a factor for each input or output, or a rotation of each block of
them, less the identity. Strengths are in all of these already, and terms of several adapters are side by side in the
rank or added up, so that what one costs is what its numbers cost. Where one adapter has a T and another a U, they
multiply, U W T included, as if one had been merged before the other: their sum would take a second product with W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from zimage_kernels import Backend, Int8Rows, project_rows
from zimage_kernels.planes import Planes, from_planes, in_planes, is_faster_in_planes, project_planes
from zimage_kernels.rotation import hadamard_rotate


@dataclass
class SidePath:
    """a: [r, K], b: [N, r]; krons: (w1 [N1, K1], w2 [N2, K2]) with N1 N2 = N and K1 K2 = K; dense: [N, K]; in_blocks,
    out_blocks: [blocks, size, size] each; these in the dtype to compute in. in_gain: [K], out_gain, bias: [N] float32.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    krons: Sequence[tuple[Tensor, Tensor]] = ()
    dense: Tensor | None = None
    in_gain: Tensor | None = None
    in_blocks: Sequence[Tensor] = ()
    out_gain: Tensor | None = None
    out_blocks: Sequence[Tensor] = ()
    bias: Tensor | None = None
    backend: Backend | None = None  # of the product with A; None: as that with the weight
    group: int = field(default=0, init=False)  # by which `a` is rotated, in place
    _planes: Planes | None = field(default=None, init=False)  # of the rotated `a`, in its place

    @property
    def changes_input(self) -> bool:
        """Then the linear must be given x itself, not its 8-bit codes."""
        return self.in_gain is not None or bool(self.in_blocks)

    @property
    def rides(self) -> bool:
        """Whether the epilogue of an 8-bit product takes all of it."""
        return not (self.krons or self.out_blocks or self.dense is not None or self.changes_input)

    def given(self, x: Tensor) -> Tensor:
        """x + T x: what the weight multiplies. x: [tokens, K]."""
        y = x if self.in_gain is None else x + x * self.in_gain.to(x.dtype)
        for blocks in self.in_blocks:
            y = y + _blockwise(x, blocks)
        return y

    def added(self, z: Tensor, x: Tensor) -> Tensor:
        """All that follows z = W (x + T x), without the bias. z: [tokens, N], overwritten."""
        y = z
        for blocks in self.out_blocks:
            y = y + _blockwise(z, blocks)
        if self.out_gain is not None:
            y = y + z * self.out_gain.to(z.dtype)
        if self.a is not None and self.b is not None:
            y.addmm_(x @ self._a_for(0).T, self.b.T)
        for w1, w2 in self.krons:
            inner = x.unflatten(-1, (w1.shape[1], w2.shape[1])) @ w2.T
            y += (w1 @ inner).flatten(-2)
        if self.dense is not None:
            y.addmm_(x, self.dense.T)
        return y

    def scaled(self, w_scale: Tensor) -> Tensor:
        """The scales of 8-bit rows with the factors of their outputs. w_scale: [N] float32."""
        return w_scale if self.out_gain is None else w_scale + w_scale * self.out_gain

    def low_rank(self, x: Int8Rows, group: int, backend: Backend) -> tuple[Tensor, Tensor] | None:
        """(x A^T, B), as `linear_int8` takes them. x: rotated by `group`, and so is A then: (x R) (A R)^T = x A^T, as R
        is orthogonal."""
        if self.a is None or self.b is None:
            return None
        if self._planes is None and is_faster_in_planes(self.a):
            self._planes = in_planes(self._a_for(group))
        if self._planes is not None:
            return project_planes(*x, self._planes), self.b
        return project_rows(*x, self._a_for(group), self.backend or backend), self.b

    def rows(self, start: int, stop: int) -> SidePath:
        """What concerns these outputs: whole blocks where they are rotated; of factors, the product."""
        some = slice(start, stop)
        kron = sum((torch.kron(w1, w2)[some] for w1, w2 in self.krons), start=torch.zeros(()))
        dense = kron if self.dense is None else self.dense[some] + kron
        return replace(
            self,
            b=None if self.b is None else self.b[some],
            krons=(),
            dense=dense if dense.ndim else None,
            out_gain=None if self.out_gain is None else self.out_gain[some],
            out_blocks=[blocks[start // blocks.shape[1] : stop // blocks.shape[1]] for blocks in self.out_blocks],
            bias=None if self.bias is None else self.bias[some],
        )

    def plain_bias(self, bias: Tensor | None) -> Tensor | None:
        """The linear's own and what is added to it."""
        if bias is None or self.bias is None:
            return bias if self.bias is None else self.bias
        return bias + self.bias.to(bias.dtype)

    def _a_for(self, group: int) -> Tensor:
        """A for inputs rotated by `group`. A linear's inputs are all alike, so it is turned once, in its own place."""
        assert self.a is not None
        if self._planes is not None:
            self.a.copy_(from_planes(self._planes))
            self._planes = None
        if group != self.group:
            for own in (self.group, group):  # a rotation is its own inverse
                if own:
                    self.a.copy_(hadamard_rotate(self.a, own))
            self.group = group
        return self.a


def unrotated(x: Int8Rows, group: int, dtype: torch.dtype) -> Tensor:
    """The input that such codes stand for: [tokens, K]."""
    wide = x.codes.to(dtype) * x.scale[:, None].to(dtype)
    return hadamard_rotate(wide, group) if group else wide


def _blockwise(x: Tensor, blocks: Tensor) -> Tensor:
    """Each block of x's columns, as row vectors, times its own matrix. x: [tokens, n]; blocks: [n/size, size, size]."""
    return torch.einsum("tbi,bij->tbj", x.unflatten(-1, (len(blocks), -1)), blocks).flatten(-2)
