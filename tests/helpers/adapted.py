"""What an opened adapter does to the weights of the tiny model, held against what it should do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from adapter_files import TINY, Described
from packing import packed_as
from safetensors.torch import save_file
from torch import Tensor

from zimage_lite.adapters.joined import AdapterSet, JoinedModule, merged
from zimage_lite.adapters.reading import Adapter
from zimage_lite.checkpoint.opening import open_tensor_file
from zimage_lite.checkpoint.stored import StoredTensor
from zimage_lite.config import Lora
from zimage_lite.model.linear import Linear, bind, shapes
from zimage_lite.model.side_path import SidePath
from zimage_lite.model.transformer import Transformer
from zimage_lite.quant.formats import FORMATS

STRENGTHS = (-1.0, 0.0, 0.5, 1.0, 2.0)
# Of the change, in float32: a result is up to some ten times the change, and each of its some ten roundings is 6e-8.
MOST = 1e-5

Wanted = dict[str, tuple[Tensor | None, Tensor | None]]  # module -> changes of its weight and its bias, float64


class Weights:
    """Of the tiny model, random, in a file."""

    def __init__(self, folder: Path) -> None:
        random = torch.Generator().manual_seed(3)
        self.tensors = {
            name: torch.randn(shape, generator=random) * shape[-1] ** -0.5
            for name, shape in shapes(Transformer(TINY)).items()
        }
        save_file(self.tensors, folder / "weights.safetensors")
        entries = open_tensor_file(folder / "weights.safetensors").entries
        self.stored = {
            name: StoredTensor(name, FORMATS["f32"], entry.shape, {"": entry}) for name, entry in entries.items()
        }

    def of(self, module: str) -> Tensor:
        """[rows, columns]"""
        weight = self.tensors.get(f"{module}.weight", self.tensors.get(module))
        assert weight is not None
        return weight if weight.ndim == 2 else weight[None]

    def wanted(self, described: Described) -> Wanted:
        return changes_of(described, self.of)


def changes_of(described: Described, weight_of: Callable[[str], Tensor]) -> Wanted:
    """weight_of: module -> [rows, columns]."""
    changes: dict[str, Tensor] = {}
    for modules, change in described.changes:
        weights = [weight_of(module).double() for module in modules]
        parts = change(torch.cat(weights)).split([len(weight) for weight in weights])
        for module, part in zip(modules, parts, strict=True):
            changes[module] = changes.get(module, 0.0) + part
    names = dict.fromkeys([*changes, *described.biases])
    return {name: (changes.get(name), described.biases.get(name)) for name in names}


def joined_modules(adapters: Sequence[tuple[Adapter, float]], weights: Weights) -> Mapping[str, JoinedModule]:
    joined = set_of(*adapters)
    joined.measure(weights.stored)
    return joined.modules(torch.float32)


def set_of(*adapters: tuple[Adapter, float]) -> AdapterSet:
    """Each with its strength."""
    return AdapterSet(tuple((adapter, Lora(str(adapter.path), m)) for adapter, m in adapters))


def side_of(joined: JoinedModule) -> SidePath:
    return joined.side_in(filled(joined))


def filled(joined: JoinedModule) -> Tensor:
    """What was in the memory before must not matter."""
    buffer = torch.full((joined.packed_bytes,), 0x7F, dtype=torch.uint8)
    joined.read_to(buffer)
    return buffer


def assert_applied(adapters: Sequence[tuple[Adapter, float]], wanted: Wanted, weights: Weights) -> None:
    """The adapters, at these strengths, change the modules as wanted, and no others; at 0, none."""
    modules = joined_modules(adapters, weights)
    assert set(modules) == (set(wanted) if any(m for _, m in adapters) else set())
    for module, joined in modules.items():
        weight, (change, bias) = weights.of(module), wanted[module]
        if joined.is_linear:
            side = side_of(joined)
            _assert_near(merged(weight, side).double() - weight.double(), change, module)
            _assert_near(_of_linear(weight, side), _product(weight, change, bias), f"{module} multiplied")
        else:
            _assert_near(joined.delta_in(filled(joined)).double(), change, module)


def inputs(columns: int) -> Tensor:
    return torch.randn(5, columns, generator=torch.Generator().manual_seed(columns))


def _of_linear(weight: Tensor, side: SidePath) -> Tensor:
    """What the side path changes in a linear's output."""
    linear = Linear(weight.shape[1], weight.shape[0])
    bind(linear, {"weight": packed_as("f32", weight)}, torch.float32)
    before = linear(inputs(weight.shape[1]))
    linear.side = side
    return linear(inputs(weight.shape[1])).double() - before.double()


def _product(weight: Tensor, change: Tensor | None, bias: Tensor | None) -> Tensor:
    by = torch.zeros_like(weight).double() if change is None else change
    y = inputs(weight.shape[1]).double() @ by.T
    return y if bias is None else y + bias


def _assert_near(value: Tensor, wanted: Tensor | None, where: str) -> None:
    if wanted is None or not wanted.any():
        assert not value.any(), where
    else:
        assert (value - wanted).norm() <= MOST * wanted.norm(), where
