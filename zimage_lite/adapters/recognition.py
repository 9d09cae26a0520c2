"""Of what kinds the tensors are that a file has for a module, and whether they fit it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import WrongModelError
from .spelling import Target
from .updates import Change, Dense, Dora, Hadamard, Kronecker, LowRank, Raw, Rotation, Update

Params = Mapping[str, Raw]
ScaleOf = Callable[[int], float]  # rank -> scale; rank 0: the tensors do not show it

_CONVOLUTIONS = {"lora_mid", "hada_t1", "hada_t2", "lokr_t1", "lokr_t2"}
_MAGNITUDES = {"dora_scale", "magnitude", "lora_magnitude_vector"}
SCALES = {"alpha", "scale"}
NO_KIND = "is of no kind of adapter known here"


def updates_of(params: Params, where: str, target: Target, scale_of: ScaleOf | None) -> dict[str, Update]:
    """Kind -> update, of one module of the file, whose tensors are params. target: any that it stands for; scale_of: as
    a config beside the file says; else the file's own alpha counts. Raises WrongModelError."""
    own, names = _Tensors(params, where, target, scale_of), set(params)
    known = (parts for parts, _ in (*_CHANGES.values(), *_OTHERS.values()))
    if strange := sorted(names.difference(_MAGNITUDES, SCALES, *known)):
        why = "belongs to a convolution, and Z-Image has none" if strange[0] in _CONVOLUTIONS else NO_KIND
        raise own.wrong(f"{strange[0]} {why}")
    changes = {kind: make(own) for kind, (parts, make) in _CHANGES.items() if names & parts}
    found: dict[str, Update] = {**changes}
    if magnitudes := sorted(names & _MAGNITUDES):
        if len(changes) != 1 or len(magnitudes) != 1:
            raise own.wrong(f"{magnitudes[0]}, a DoRA magnitude, without the one LoRA that it scales")
        ((kind, change),) = changes.items()
        found = {"DoRA" if kind == "LoRA" else f"DoRA of {kind}": _dora(own, magnitudes[0], change)}
    found |= {kind: make(own) for kind, (parts, make) in _OTHERS.items() if names & parts}
    if not found:
        raise own.wrong(f"alpha alone {NO_KIND}")
    if not target.is_linear and found.keys() != {"difference"}:
        raise own.wrong("a vector", got=", ".join(found), expected="its difference")
    return found


class OtherSizesError(WrongModelError):
    """It is whole, and for a model of other widths."""


@dataclass(frozen=True)
class _Tensors:
    """Those of one module, held against the shapes that it asks for."""

    params: Params
    where: str
    target: Target
    scale_of: ScaleOf | None

    def __getitem__(self, name: str) -> Raw:
        return self.params[name]

    def get(self, name: str) -> Raw | None:
        return self.params.get(name)

    def wrong(self, what: str, **said: object) -> WrongModelError:
        return WrongModelError(f"{self.where}: {what}", **said)  # type: ignore[arg-type]

    def require(self, *names: str) -> None:
        if missing := [name for name in names if name not in self.params]:
            there = ", ".join(name for name in names if name in self.params)
            raise self.wrong(
                f"{', '.join(missing)} missing", got=f"{there or 'others'} alone", fix="the file is incomplete"
            )

    def size(self, name: str) -> tuple[int, int]:
        """[rows, columns]; a convolution with a kernel of one is a matrix, too."""
        shape = self[name].shape
        if len(shape) < 2 or not math.prod(shape) or any(kernel != 1 for kernel in shape[2:]):
            raise self.wrong(name, got=list(shape), expected="a matrix")
        return shape[0], shape[1]

    def pair(self, a: str, b: str) -> tuple[int, int]:
        """The size of their product."""
        self.require(a, b)
        (rows, rank), (other_rank, columns) = self.size(a), self.size(b)
        if rank != other_rank:
            raise self.wrong(f"{a} and {b} have different ranks", got=f"{rank} and {other_rank}")
        return rows, columns

    def fit(self, *size: int) -> None:
        """Of all that the module's weight is."""
        expected = [self.target.all_rows, self.target.columns]
        if list(size) != expected:
            other = " (Lumina-Image-2 is 2304 wide)" if 2304 in size else ""
            raise OtherSizesError(f"{self.where}: made for another model{other}", got=list(size), expected=expected)

    def vector(self, name: str) -> Raw | None:
        """One number for each output, if it is there."""
        raw, rows = self.get(name), self.target.all_rows
        if raw is not None and (math.prod(raw.shape) != rows or not self.target.is_linear):
            raise self.wrong(name, got=list(raw.shape), expected=f"{rows} numbers" if self.target.is_linear else "none")
        return raw

    def number(self, name: str) -> float:
        raw = self[name]
        if math.prod(raw.shape) != 1:
            raise self.wrong(name, got=list(raw.shape), expected="one number")
        value = float(raw.read())
        if not math.isfinite(value):
            raise self.wrong(name, got=value, expected="a finite number")
        return value

    def scale(self, rank: int) -> float:
        """alpha / rank, or 1 where nothing is said."""
        if self.scale_of:
            return self.scale_of(rank)
        if "scale" in self.params:
            return self.number("scale")
        return (self.number("alpha") or rank) / rank if "alpha" in self.params else 1.0  # 0 stands for the rank


def _lora(own: _Tensors) -> LowRank:
    own.fit(*own.pair("up", "down"))
    return LowRank(own["down"], own["up"], own.scale(own.size("down")[0]), own.vector("up_bias"))


def _loha(own: _Tensors) -> Hadamard:
    own.fit(*own.pair("hada_w1_a", "hada_w1_b"))
    own.fit(*own.pair("hada_w2_a", "hada_w2_b"))
    w1_a, w1_b, w2_a, w2_b = (own[f"hada_w{number}_{half}"] for number in (1, 2) for half in "ab")
    return Hadamard(w1_a, w1_b, w2_a, w2_b, own.scale(w1_b.shape[0]))


def _lokr(own: _Tensors) -> Kronecker:
    (w1, size1), (w2, size2) = (_factor(own, f"lokr_w{number}") for number in (1, 2))
    own.fit(size1[0] * size2[0], size1[1] * size2[1])
    decomposed = w2 if len(w2) == 2 else w1
    if len(decomposed) == 2:
        return Kronecker(w1, w2, own.scale(decomposed[1].shape[0]))
    # Both factors are whole, so there is no rank to divide alpha by, and trainers write any number there, infinity
    # among them; only peft means it, and says so in its config.
    return Kronecker(w1, w2, own.scale_of(0) if own.scale_of else 1.0)


def _factor(own: _Tensors, name: str) -> tuple[tuple[Raw, ...], tuple[int, int]]:
    if own.get(name):
        return (own[name],), own.size(name)
    size = own.pair(f"{name}_a", f"{name}_b")
    return (own[f"{name}_a"], own[f"{name}_b"]), size


def _oft(own: _Tensors) -> Rotation:
    if "oft_R.weight" in own.params:
        return _oft_of_inputs(own)
    own.require("oft_blocks")
    raw, rows = own["oft_blocks"], own.target.all_rows
    if len(raw.shape) != 3 or raw.shape[1] != raw.shape[2] or raw.shape[0] * raw.shape[1] != rows:
        raise own.wrong("oft_blocks", got=list(raw.shape), expected=f"[blocks, size, size] over {rows} rows")
    if own.target.is_part and own.target.rows % raw.shape[1]:
        raise own.wrong(f"blocks of {raw.shape[1]} rows reach across fused modules")
    constraint = own.number("alpha") * rows if "alpha" in own.params else 0.0
    return Rotation(raw, False, constraint, own.vector("rescale"))


def _oft_of_inputs(own: _Tensors) -> Rotation:
    raw, columns = own["oft_R.weight"], own.target.columns
    found = Rotation(raw, True, is_scaled="oft_R.scaled_oft" in own.params)
    count, upper = raw.shape if len(raw.shape) == 2 else (0, 0)
    size = found.size if upper else 0
    if not size or size * (size - 1) // 2 != upper or columns % size or count not in (1, columns // size):
        raise own.wrong("oft_R", got=list(raw.shape), expected=f"blocks of {columns} inputs")
    return found


def _difference(own: _Tensors) -> Dense:
    weight = own.get("diff") or own.get("w_norm")
    if weight and own.target.is_linear:
        own.fit(*own.size("diff" if own.get("diff") else "w_norm"))
    elif weight:
        own.fit(1, math.prod(weight.shape))
    return Dense(weight, own.vector("diff_b") or own.vector("b_norm"))


def _dora(own: _Tensors, name: str, change: Change) -> Dora:
    """[N, 1] is of rows, [1, K] of columns; a vector of the only one that it fits, of rows if of both, as peft and
    ai-toolkit, which write vectors, have it."""
    shape, rows, columns = own[name].shape, own.target.all_rows, own.target.columns
    if len(shape) == 2 and shape in ((1, columns), (rows, 1)) and shape != (1, 1):
        return Dora(change, own[name], by_column=shape[0] == 1)
    if math.prod(shape) not in (rows, columns):
        raise own.wrong(f"{name}, a DoRA magnitude", got=list(shape), expected=f"{rows} or {columns} numbers")
    return Dora(change, own[name], by_column=math.prod(shape) != rows)


_CHANGES: dict[str, tuple[set[str], Callable[[_Tensors], Change]]] = {
    "LoRA": ({"down", "up", "up_bias"}, _lora),
    "LoHa": ({f"hada_w{number}_{half}" for number in (1, 2) for half in "ab"}, _loha),
    "LoKr": ({f"lokr_w{number}{half}" for number in (1, 2) for half in ("", "_a", "_b")}, _lokr),
}
_OTHERS: dict[str, tuple[set[str], Callable[[_Tensors], Update]]] = {
    "OFT": ({"oft_blocks", "rescale", "oft_R.weight", "oft_R.scaled_oft"}, _oft),
    "difference": ({"diff", "w_norm", "diff_b", "b_norm"}, _difference),
}
