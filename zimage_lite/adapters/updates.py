"""What an adapter's tensors do to a weight: one class for each kind, with its formula.

W is [N, K], of one module or of several fused ones below each other; m is the user's strength. Each kind says which
parts of a `SidePath` it makes, and computes them when they are wanted, from tensors that stay in their file till then:
a low-rank pair `a`, `b`; a factored `kron`; a `dense` change; a `bias`; gains and rotations of inputs and outputs.
All in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..checkpoint.container import Entry, file_stamp
from ..errors import FileFormatError
from ..quant.tensor import TORCH_DTYPES
from .spelling import Target

Shapes = dict[str, tuple[int, ...]]
Terms = dict[str, Tensor]

MOST_KRON_RANK = 256  # a LoKr that is a LoRA of at most so many ranks becomes one; above, its factors cost less
PIECE_ROWS = 512


@dataclass(frozen=True)
class Raw:
    """A tensor in its file. stamp: of the file when it was opened."""

    entry: Entry
    stamp: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    def read(self) -> Tensor:
        """float32, on the CPU."""
        return self.wide(self.stored())

    def stored(self) -> Tensor:
        """Its bytes. Raises UserError if the file changed since it was opened."""
        found = self.entry.read()
        if file_stamp(self.entry.path) != self.stamp:
            raise FileFormatError(f"{self.entry.path} changed while it was read", fix="wait until it is complete")
        return found

    def wide(self, stored: Tensor) -> Tensor:
        """Those bytes in float32."""
        return stored.view(TORCH_DTYPES[self.entry.kind]).view(self.shape).to(torch.float32)

    def matrix(self) -> Tensor:
        """Of a 1x1 convolution, too."""
        return self.read().flatten(1)


class Update(Protocol):
    """What one adapter does to one module of its file."""

    def shapes(self, target: Target) -> Shapes:
        """Of the parts that the rows of target get."""

    def terms(self, target: Target, m: float) -> Terms:
        """Those parts, for strength m."""


class Change(Update, Protocol):
    """An update that adds to the weight, whatever the weight is."""

    def change(self, first: int, rows: int) -> Tensor:
        """dW of rows [first, first + rows): [rows, K]."""


@dataclass(frozen=True)
class LowRank:
    """LoRA: dW = scale B A. down: A [r, K]; up: B [N, r]; bias: [N], scaled likewise (peft's lora_bias)."""

    down: Raw
    up: Raw
    scale: float
    bias: Raw | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def shapes(self, target: Target) -> Shapes:
        bias: Shapes = {"bias": (target.rows,)} if self.bias else {}
        return {"a": (self.rank, target.columns), "b": (target.rows, self.rank), **bias}

    def terms(self, target: Target, m: float) -> Terms:
        rows = _rows_of(target)
        found = {"a": self.down.matrix(), "b": self.up.matrix()[rows] * (m * self.scale)}
        return {**found, "bias": self.bias.read()[rows] * (m * self.scale)} if self.bias else found

    def change(self, first: int, rows: int) -> Tensor:
        return self.scale * (self.up.matrix()[first : first + rows] @ self.down.matrix())


@dataclass(frozen=True)
class Hadamard:
    """LoHa: dW = scale (w1_a w1_b) o (w2_a w2_b), exactly a LoRA of rank r1 r2: row i of its B is the product of all
    pairs of w1_a[i] and w2_a[i], column j of its A that of w1_b[:, j] and w2_b[:, j]."""

    w1_a: Raw
    w1_b: Raw
    w2_a: Raw
    w2_b: Raw
    scale: float

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0] * self.w2_b.shape[0]

    def shapes(self, target: Target) -> Shapes:
        if self._is_dense(target):
            return {"dense": (target.rows, target.columns)}
        return {"a": (self.rank, target.columns), "b": (target.rows, self.rank)}

    def terms(self, target: Target, m: float) -> Terms:
        if self._is_dense(target):
            return {"dense": m * self.change(target.first_row, target.rows)}
        rows = _rows_of(target)
        b = torch.einsum("np,nq->npq", self.w1_a.read()[rows], self.w2_a.read()[rows]).flatten(1)
        a = torch.einsum("pk,qk->pqk", self.w1_b.read(), self.w2_b.read()).flatten(0, 1)
        return {"a": a, "b": b * (m * self.scale)}

    def change(self, first: int, rows: int) -> Tensor:
        some = slice(first, first + rows)
        first_factor = self.w1_a.read()[some] @ self.w1_b.read()
        return first_factor.mul_(self.w2_a.read()[some] @ self.w2_b.read()).mul_(self.scale)

    def _is_dense(self, target: Target) -> bool:
        """Where the products of all ranks are more numbers than the change itself."""
        return self.rank * (target.rows + target.columns) > target.rows * target.columns


@dataclass(frozen=True)
class Kronecker:
    """LoKr: dW = scale kron(w1, w2). w1, w2: one tensor each, or two of which it is the product."""

    w1: tuple[Raw, ...]
    w2: tuple[Raw, ...]
    scale: float

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Rows and columns of w1, then of w2."""
        return self.w1[0].shape[0], self.w1[-1].shape[1], self.w2[0].shape[0], self.w2[-1].shape[1]

    @property
    def rank(self) -> int:
        """Of the LoRA that it is; 0 unless w2 is decomposed: kron(w1, ab) = kron(w1, a) kron(I, b)."""
        return self.sizes[1] * self.w2[1].shape[0] if len(self.w2) == 2 else 0

    def shapes(self, target: Target) -> Shapes:
        _, columns1, rows2, columns2 = self.sizes
        if self._is_low_rank:
            return {"a": (self.rank, target.columns), "b": (target.rows, self.rank)}
        if self._cuts(target):
            return {"kron.w1": (target.rows // rows2, columns1), "kron.w2": (rows2, columns2)}
        return {"dense": (target.rows, target.columns)}

    def terms(self, target: Target, m: float) -> Terms:
        rows2, scale = self.sizes[2], m * self.scale
        if self._is_low_rank:
            w2_a, w2_b = (factor.read() for factor in self.w2)
            b = torch.kron(_product(self.w1), w2_a)[_rows_of(target)]
            return {"a": torch.kron(torch.eye(self.sizes[1]), w2_b), "b": b * scale}
        if self._cuts(target):
            some = slice(target.first_row // rows2, (target.first_row + target.rows) // rows2)
            return {"kron.w1": _product(self.w1)[some] * scale, "kron.w2": _product(self.w2)}
        return {"dense": m * self.change(target.first_row, target.rows)}

    def change(self, first: int, rows: int) -> Tensor:
        rows2 = self.sizes[2]
        start, stop = first // rows2, -(-(first + rows) // rows2)
        whole = torch.kron(_product(self.w1)[start:stop], _product(self.w2))
        return self.scale * whole[first - start * rows2 :][:rows]

    @property
    def _is_low_rank(self) -> bool:
        return 0 < self.rank <= MOST_KRON_RANK

    def _cuts(self, target: Target) -> bool:
        """Whether the target's rows are whole rows of w1."""
        return target.first_row % self.sizes[2] == 0 and target.rows % self.sizes[2] == 0


@dataclass(frozen=True)
class Dense:
    """A difference of whole weights or biases. weight: [N, K] or a vector's [K]; bias: [N]."""

    weight: Raw | None = None
    bias: Raw | None = None

    def shapes(self, target: Target) -> Shapes:
        weight: Shapes = {"dense": (target.rows, target.columns)} if self.weight else {}
        return {**weight, **({"bias": (target.rows,)} if self.bias else {})}

    def terms(self, target: Target, m: float) -> Terms:
        weight = {"dense": m * self.change(target.first_row, target.rows)} if self.weight else {}
        return {**weight, **({"bias": m * self.bias.read()[_rows_of(target)]} if self.bias else {})}

    def change(self, first: int, rows: int) -> Tensor:
        assert self.weight is not None
        wide = self.weight.read()
        return (wide.flatten(1) if wide.ndim > 1 else wide[None])[first : first + rows]


@dataclass
class Dora:
    """W'' = W + m (V g - W) with V = W + dW and g = magnitude / |V|, a factor for each row of V, or for each column.

    As the paper has it, |V| is of the changed weight (arXiv 2402.09353, eq. 5); peft, LyCORIS and OneTrainer agree.
    It is measured once; after that no weight is needed: the factor scales outputs (rows) or inputs (columns)."""

    inner: Change
    magnitude: Raw
    by_column: bool
    norm: Tensor | None = field(default=None, repr=False)

    def shapes(self, target: Target) -> Shapes:
        gain: Shapes = {"in_gain": (target.columns,)} if self.by_column else {"out_gain": (target.rows,)}
        inner = self.inner.shapes(target)
        return {**gain, **(inner if "a" in inner else {"dense": (target.rows, target.columns)})}

    def terms(self, target: Target, m: float) -> Terms:
        gain, inner = self._gain(target), self.inner.shapes(target)
        found = self.inner.terms(target, m) if "a" in inner else {"dense": m * self._change(target)}
        scaled = "dense" if "dense" in found else "a" if self.by_column else "b"
        found[scaled] = found[scaled] * (gain if self.by_column else gain[:, None])
        return {"in_gain" if self.by_column else "out_gain": m * (gain - 1), **found}

    def measure(self, weight: Callable[[int, int], Tensor], all_rows: int) -> None:
        """weight(first, rows): those rows of W, float32 [rows, K]."""
        squares = []
        for first in range(0, all_rows, PIECE_ROWS):
            rows = min(PIECE_ROWS, all_rows - first)
            changed = weight(first, rows) + self.inner.change(first, rows)
            squares.append(changed.square().sum(0 if self.by_column else 1))
        total = torch.stack(squares).sum(0) if self.by_column else torch.cat(squares)
        self.norm = total.sqrt_().clamp_(min=torch.finfo(torch.float32).tiny)

    def _gain(self, target: Target) -> Tensor:
        assert self.norm is not None, "measure comes first"
        gain = self.magnitude.read().flatten() / self.norm
        return gain if self.by_column else gain[_rows_of(target)]

    def _change(self, target: Target) -> Tensor:
        return self.inner.change(target.first_row, target.rows)


@dataclass(frozen=True)
class Rotation:
    """OFT: W_k' = R_k^T W_k for each block k of rows, R = (I + Q)(I - Q)^-1, Q = b - b^T (LyCORIS); or, from peft, each
    block of inputs as a row vector times R = I + 2Q + 2Q^2 + 2Q^3 + Q^4, Q from its upper triangle.

    blocks: [count, size, size], or [count, size (size - 1) / 2] of inputs. constraint: the largest norm of Q, 0 for
    none. rescale: [N]."""

    blocks: Raw
    of_inputs: bool
    constraint: float = 0.0
    rescale: Raw | None = None
    is_scaled: bool = False

    @property
    def size(self) -> int:
        last = self.blocks.shape[-1]
        return (1 + math.isqrt(1 + 8 * last)) // 2 if self.of_inputs else last

    def shapes(self, target: Target) -> Shapes:
        size, width = self.size, target.columns if self.of_inputs else target.rows
        return {"in_block" if self.of_inputs else "out_block": (width // size, size, size)}

    def terms(self, target: Target, m: float) -> Terms:
        identity = torch.eye(self.size)
        if self.of_inputs:
            turned = self._neumann(identity).expand(target.columns // self.size, -1, -1)
            return {"in_block": m * (turned - identity)}
        turned = self._cayley(identity)
        if self.rescale:
            turned = turned * self.rescale.read().view(len(turned), 1, self.size)
        some = slice(target.first_row // self.size, (target.first_row + target.rows) // self.size)
        return {"out_block": m * (turned[some] - identity)}

    def _cayley(self, identity: Tensor) -> Tensor:
        b = self.blocks.read()
        q = b - b.transpose(-1, -2)
        if self.constraint > 0:
            norm = q.norm()
            q = q * ((norm.clamp(max=self.constraint) + 1e-8) / (norm + 1e-8))
        return (identity + q) @ torch.linalg.inv(identity - q)

    def _neumann(self, identity: Tensor) -> Tensor:
        upper, size = self.blocks.read(), self.size
        q = torch.zeros(len(upper), size, size)
        rows, columns = torch.triu_indices(size, size, 1)
        q[:, rows, columns] = upper
        q = q - q.transpose(-1, -2)
        if self.is_scaled:
            q = q / (2 * math.sqrt(size - 1))
        squared = q @ q
        return identity + 2 * (q + squared + squared @ q) + squared @ squared


def _rows_of(target: Target) -> slice:
    return slice(target.first_row, target.first_row + target.rows)


def _product(factors: tuple[Raw, ...]) -> Tensor:
    first, *others = (factor.read() for factor in factors)
    return first @ others[0] if others else first
