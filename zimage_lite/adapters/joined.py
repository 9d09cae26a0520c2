"""All adapters of an image, joined for each module: what is read beside its weight, and how it lies in memory.

Nothing is prepared beforehand: the parts are computed from the adapters' own files when a block's weights are read,
into the same place, and travel with them. So the planner counts them as bytes of their block, and whatever holds for
weights, staying, waiting or streaming, holds for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor
from zimage_kernels import Backend

from ..checkpoint.stored import StoredTensor, aligned
from ..config import Lora
from ..model.side_path import SidePath
from ..model.transformer import is_time_weight
from ..units import round_up
from .reading import Adapter, Applied
from .updates import Dora, Shapes

RANK_STEP = 16  # ranks are filled up to a multiple with zeros: what one matrix instruction takes
_WIDE = ("in_gain", "out_gain", "bias", "delta")  # in float32, whatever is computed in
_BLOCKS = ("layers", "noise_refiner", "context_refiner", "siglip_refiner")


@dataclass(frozen=True)
class JoinedModule:
    """What all adapters change in one module: (update, strength) of each. dtype: to compute in."""

    module: str
    applied: tuple[tuple[Applied, float], ...]
    dtype: torch.dtype

    @property
    def is_linear(self) -> bool:
        return self.applied[0][0].target.is_linear

    @cached_property
    def shapes(self) -> Shapes:
        """Of all parts, under the names of `SidePath`, lists numbered; of a vector: `delta`."""
        found: Shapes = {}
        for number, (one, _) in enumerate(self.applied):
            for part, shape in one.update.shapes(one.target).items():
                name = self._name(part, number)
                if part in ("a", "b") and name in found:
                    joined = found[name][0] + shape[0] if part == "a" else found[name][1] + shape[1]
                    shape = (joined, shape[1]) if part == "a" else (shape[0], joined)
                found[name] = shape
        if "a" in found:
            rank = round_up(found["a"][0], RANK_STEP)
            found["a"], found["b"] = (rank, found["a"][1]), (found["b"][0], rank)
        return found

    @property
    def packed_bytes(self) -> int:
        return sum(aligned(math.prod(shape) * self._dtype(name).itemsize) for name, shape in self.shapes.items())

    @property
    def flops(self) -> int:
        """For each token, multiplications and additions apart."""
        of_matrices = {name: shape for name, shape in self.shapes.items() if name not in _WIDE}
        total = 0
        for name, shape in of_matrices.items():
            total += 2 * math.prod(shape)
            if name.endswith("kron.w2"):  # once for each column of w1, and w1 once for each row of w2
                rows1, columns1 = of_matrices[name.replace("w2", "w1")]
                total += 2 * math.prod(shape) * (columns1 - 1) + 2 * rows1 * columns1 * (shape[0] - 1)
        return total

    @property
    def reading_bytes(self) -> int:
        """What computing the parts takes for a moment: all of them in float32, and once more in the making."""
        return 8 * sum(map(math.prod, self.shapes.values()))

    def read_to(self, buffer: Tensor) -> None:
        """buffer: [packed_bytes] uint8 on the CPU."""
        places = self._places(buffer)
        for name, place in places.items():
            if name not in ("a", "b"):
                place.zero_()
        rank = 0
        for number, (one, strength) in enumerate(self.applied):
            terms = one.update.terms(one.target, strength)
            own = len(terms["a"]) if "a" in terms else 0
            for part, values in terms.items():
                place = places[self._name(part, number)]
                if part == "a":
                    place[rank : rank + own].copy_(values)
                elif part == "b":
                    place[:, rank : rank + own].copy_(values)
                else:
                    place.add_(values.reshape(place.shape))
            rank += own
        if "a" in places:  # up to a whole number of steps
            places["a"][rank:] = places["b"][:, rank:] = 0

    def made(self) -> Tensor:
        """[packed_bytes] uint8 on the CPU, filled."""
        buffer = torch.empty(self.packed_bytes, dtype=torch.uint8)
        self.read_to(buffer)
        return buffer

    @property
    def unit_rows(self) -> int:
        """Rows of the weight that change together: 1, or a rotation's."""
        return math.lcm(*(shape[1] for name, shape in self.shapes.items() if name.endswith("out_block")))

    def side_in(self, buffer: Tensor, backend: Backend | None = None) -> SidePath:
        """Of a linear, from where `read_to` has put it, or what was copied from there. backend: see `SidePath`."""
        places = self._places(buffer)
        krons = [name for name in places if name.endswith("kron.w1")]
        return SidePath(
            **{name: places.get(name) for name in ("a", "b", "dense", "in_gain", "out_gain", "bias")},
            krons=[(places[name], places[name.replace("w1", "w2")]) for name in krons],
            in_blocks=[place for name, place in places.items() if name.endswith("in_block")],
            out_blocks=[place for name, place in places.items() if name.endswith("out_block")],
            backend=backend,
        )

    def delta_in(self, buffer: Tensor) -> Tensor:
        """Of a vector: what is added to it, in float32."""
        return self._places(buffer)["delta"]

    def _name(self, part: str, number: int) -> str:
        if not self.is_linear:
            return "delta"
        return f"{number}.{part}" if part.startswith(("kron", "in_block", "out_block")) else part

    def _dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in _WIDE else self.dtype

    def _places(self, buffer: Tensor) -> dict[str, Tensor]:
        found, at = {}, 0
        for name, shape in self.shapes.items():
            n_bytes = math.prod(shape) * self._dtype(name).itemsize
            found[name] = buffer[at : at + n_bytes].view(self._dtype(name)).view(shape)
            at += aligned(n_bytes)
        return found


@dataclass(frozen=True)
class AdapterSet:
    """Adapters and how strong each is, in the order in which they were named; those of strength 0 are left out."""

    adapters: tuple[tuple[Adapter, Lora], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.adapters)

    def modules(self, dtype: torch.dtype) -> dict[str, JoinedModule]:
        """Module -> what changes it."""
        found: dict[str, list[tuple[Applied, float]]] = {}
        for adapter, lora in self.adapters:
            for one in adapter.applied:
                if strength := lora.on(one.target.module):
                    found.setdefault(one.target.module, []).append((one, strength))
        return {module: JoinedModule(module, tuple(applied), dtype) for module, applied in found.items()}

    @property
    def changes_times(self) -> bool:
        """Whether it adds to what is computed once for all steps."""
        return any(
            is_time_weight(f"{one.target.module}.weight") for adapter, _ in self.adapters for one in adapter.applied
        )

    def measure(self, weights: Mapping[str, StoredTensor]) -> None:
        """The norms that DoRA needs, once for each adapter. weights: module + ".weight" -> where it lies."""
        for adapter, _ in self.adapters:
            for one in adapter.applied:
                update = one.update
                if isinstance(update, Dora) and update.norm is None:  # those of fused modules share one
                    stored = [weights[f"{target.module}.weight"] for target in one.all_targets]
                    update.measure(partial(_rows, stored), one.target.all_rows)


def by_block(modules: Iterable[JoinedModule]) -> tuple[dict[str, list[JoinedModule]], list[JoinedModule]]:
    """-> "layers.3" -> its modules; and those that belong to no block. Time weights are in neither."""
    blocks, rest = dict[str, list[JoinedModule]](), list[JoinedModule]()
    for joined in modules:
        group, _, inner = joined.module.partition(".")
        if is_time_weight(f"{joined.module}.weight"):
            continue
        if group in _BLOCKS:
            blocks.setdefault(f"{group}.{inner.partition('.')[0]}", []).append(joined)
        else:
            rest.append(joined)
    return blocks, rest


def merged(weight: Tensor, side: SidePath) -> Tensor:
    """The weight that alone does what it and the side path do together. weight: [N, K] float32."""
    z = weight @ side.given(torch.eye(weight.shape[1])).T if side.changes_input else weight
    y = z
    for blocks in side.out_blocks:
        y = y + _rows_changed(z, blocks)
    if side.out_gain is not None:
        y = y + z * side.out_gain[:, None]
    if side.a is not None and side.b is not None:
        y = y + side.b @ side.a
    for w1, w2 in side.krons:
        y = y + torch.kron(w1, w2)
    return y if side.dense is None else y + side.dense


def _rows_changed(z: Tensor, blocks: Tensor) -> Tensor:
    """Outputs as row vectors times their blocks."""
    return torch.einsum("bij,bik->bkj", z.unflatten(0, (len(blocks), -1)), blocks).flatten(0, 1)


def _rows(stored: Sequence[StoredTensor], first: int, rows: int) -> Tensor:
    """Rows of several weights below each other, in float32."""
    found = []
    for tensor in stored:
        start, stop = max(first, 0), min(first + rows, tensor.rows)
        if start < stop:
            found.append(tensor.read_float(start, stop))
        first -= tensor.rows
    return torch.cat(found)


NOTHING = AdapterSet()
