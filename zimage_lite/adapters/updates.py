"""What an adapter's tensors do to a weight: one class for each kind, with its formula.

W is [N, K], of one module or of several fused ones below each other; m is the user's strength. Each kind says which
parts of a `SidePath` it makes, and computes them when they are wanted, from tensors that stay in their file till then:
a low-rank pair `a`, `b`; a factored `kron`; a `dense` change; a `bias`; gains and rotations of inputs and outputs.
All in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..checkpoint.container import Entry
from ..errors import WrongModelError
from ..quant.tensor import TORCH_DTYPES
from .spelling import Target

Shapes = dict[str, tuple[int, ...]]
Terms = dict[str, Tensor]

MOST_KRON_RANK = 256  # a LoKr that is a LoRA of at most so many ranks becomes one; above, its factors cost less
PIECE_ROWS = 512


@dataclass(frozen=True)
class Raw:
    """A tensor in its file."""

    entry: Entry

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    def read(self) -> Tensor:
        """float32, on the CPU."""
        stored = self.entry.read().view(TORCH_DTYPES[self.entry.kind]).view(self.shape)
        return stored.to(torch.float32)

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


Params = Mapping[str, Raw]
_PAIR, _HADA = {"down", "up"}, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_CONVOLUTIONS = {"lora_mid", "hada_t1", "hada_t2", "lokr_t1", "lokr_t2"}  # Z-Image's transformer has none
_DIFFS = {"diff", "w_norm", "diff_b", "b_norm"}
_MAGNITUDES = {"dora_scale", "magnitude", "lora_magnitude_vector"}
_IGNORED = {"alpha", "scale", "rescale", "oft_R.scaled_oft", "up_bias"}


def updates_of(
    params: Params, where: str, target: Target, scale_of: Callable[[int], float] | None
) -> dict[str, Update]:
    """Kind -> update, of one module of the file, whose tensors are params. target: any that it stands for; scale_of:
    rank -> scale, as a config beside the file says; else the file's own alpha counts. Raises WrongModelError."""
    found, used = dict[str, Update](), set(_IGNORED)
    names, shape = set(params), (target.all_rows, target.columns)
    if strange := names & _CONVOLUTIONS:
        raise WrongModelError(f"{where}: {min(strange)} belongs to a convolution, and Z-Image has none")
    inner: Change | None = None
    if names & _PAIR:
        _require(_PAIR, names, where)
        rank = params["down"].shape[0]
        inner = LowRank(params["down"], params["up"], _scale(params, rank, where, scale_of), params.get("up_bias"))
        _require_shape(where, (params["up"].shape[0], math.prod(params["down"].shape[1:])), shape)
        _require_shape(f"{where} (ranks of both halves)", params["up"].shape[1:2], params["down"].shape[:1])
        found["LoRA"], used = inner, used | _PAIR
    elif names & _HADA:
        _require(_HADA, names, where)
        w1_a, w1_b, w2_a, w2_b = (params[name] for name in sorted(_HADA))
        inner = Hadamard(w1_a, w1_b, w2_a, w2_b, _scale(params, w1_b.shape[0], where, scale_of))
        for a, b in ((w1_a, w1_b), (w2_a, w2_b)):
            _require_shape(where, (a.shape[0], b.shape[1]), shape)
        found["LoHa"], used = inner, used | _HADA
    elif any(name.startswith("lokr_") for name in names):
        inner = _kronecker(params, where, scale_of)
        rows1, columns1, rows2, columns2 = inner.sizes
        _require_shape(where, (rows1 * rows2, columns1 * columns2), shape)
        found["LoKr"], used = inner, used | {name for name in names if name.startswith("lokr_")}
    elif names & {"oft_blocks", "oft_R.weight"}:
        found["OFT"], used = _rotation(params, where, target), used | {"oft_blocks", "oft_R.weight"}
    if names & _DIFFS:
        dense = Dense(params.get("diff") or params.get("w_norm"), params.get("diff_b") or params.get("b_norm"))
        _require_dense(dense, where, target)
        found["difference"], used = dense, used | _DIFFS
    if magnitude := names & _MAGNITUDES:
        if inner is None:
            raise WrongModelError(f"{where}: a DoRA magnitude without the LoRA that it scales")
        kind, raw = next(iter(found)), params[min(magnitude)]
        found[f"DoRA of {kind}" if kind != "LoRA" else "DoRA"] = Dora(inner, raw, _by_column(raw, shape, where))
        del found[kind]
        used |= magnitude
    if not found:
        rest = sorted(names - _IGNORED)
        raise WrongModelError(f"{where}: {', '.join(rest) or 'alpha alone'} is of no kind of adapter known here")
    return found


def _kronecker(params: Params, where: str, scale_of: Callable[[int], float] | None) -> Kronecker:
    def factor(name: str) -> tuple[Raw, ...]:
        if name in params:
            return (params[name],)
        _require({f"{name}_a", f"{name}_b"}, set(params), where)
        return params[f"{name}_a"], params[f"{name}_b"]

    w1, w2 = factor("lokr_w1"), factor("lokr_w2")
    decomposed = w2 if len(w2) == 2 else w1
    if len(decomposed) == 2:
        return Kronecker(w1, w2, _scale(params, decomposed[1].shape[0], where, scale_of))
    # Both factors are whole, so there is no rank to divide alpha by, and trainers write any number there, infinity
    # among them; only peft means it, and says so in its config.
    return Kronecker(w1, w2, scale_of(0) if scale_of else 1.0)


def _rotation(params: Params, where: str, target: Target) -> Rotation:
    if "oft_blocks" in params:
        raw = params["oft_blocks"]
        if len(raw.shape) != 3 or raw.shape[1] != raw.shape[2] or raw.shape[0] * raw.shape[1] != target.all_rows:
            raise WrongModelError(
                f"{where}: oft_blocks", got=raw.shape, expected=f"[blocks, size, size] over {target.all_rows} rows"
            )
        if target.is_part and target.rows % raw.shape[1]:
            raise WrongModelError(f"{where}: blocks of {raw.shape[1]} rows reach across fused modules")
        constraint = float(params["alpha"].read().flatten()[0]) * target.all_rows if "alpha" in params else 0.0
        return Rotation(raw, False, constraint, params.get("rescale"))
    found = Rotation(params["oft_R.weight"], True, is_scaled="oft_R.scaled_oft" in params)
    size, count = found.size, found.blocks.shape[0]
    if size * (size - 1) // 2 != found.blocks.shape[-1] or count * size not in (size, target.columns):
        raise WrongModelError(f"{where}: oft_R", got=found.blocks.shape, expected=f"blocks of {target.columns} inputs")
    return found


def _by_column(magnitude: Raw, shape: tuple[int, int], where: str) -> bool:
    """[N, 1] is of rows, [1, K] of columns; a vector of the only one that it fits, of rows if of both, as peft and
    ai-toolkit, which write vectors, have it."""
    rows, columns = shape
    size = math.prod(magnitude.shape)
    if len(magnitude.shape) == 2 and magnitude.shape in ((1, columns), (rows, 1)) and magnitude.shape != (1, 1):
        return magnitude.shape[0] == 1
    if size not in shape:
        raise WrongModelError(f"{where}: DoRA magnitude", got=magnitude.shape, expected=f"{rows} or {columns} numbers")
    return size != rows


def _scale(params: Params, rank: int, where: str, scale_of: Callable[[int], float] | None) -> float:
    """alpha / rank, or 1 where nothing is said."""
    if scale_of:
        return scale_of(rank)
    for name in ("scale", "alpha"):
        if name in params:
            value = float(params[name].read().flatten()[0])
            if not math.isfinite(value):
                raise WrongModelError(f"{where}: {name}", got=value, expected="a finite number")
            return value if name == "scale" else (value or rank) / rank  # 0 stands for the rank
    return 1.0


def _require(wanted: set[str], names: set[str], where: str) -> None:
    if missing := sorted(wanted - names):
        there = sorted(wanted & names)
        raise WrongModelError(
            f"{where}: {', '.join(missing)} missing", got=f"{', '.join(there)} alone", fix="the file is incomplete"
        )


def _require_shape(where: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if got != expected:
        other = " (Lumina-Image-2 is 2304 wide)" if 2304 in got else ""
        raise WrongModelError(f"{where}: made for another model{other}", got=list(got), expected=list(expected))


def _require_dense(dense: Dense, where: str, target: Target) -> None:
    if dense.weight:
        shape = dense.weight.shape
        flat = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, *shape)
        _require_shape(where, flat, (target.all_rows, target.columns))
    if dense.bias and math.prod(dense.bias.shape) != target.all_rows:
        _require_shape(f"{where} (bias)", dense.bias.shape, (target.all_rows,))


def _rows_of(target: Target) -> slice:
    return slice(target.first_row, target.first_row + target.rows)


def _product(factors: tuple[Raw, ...]) -> Tensor:
    first, *others = (factor.read() for factor in factors)
    return first @ others[0] if others else first
