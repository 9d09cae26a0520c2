"""The LoRA in training: for each linear of the transformer's layers a pair A, B, beside its weight.

The refiners learn nothing, as in most trainers: then no gradient has to go further back than the first layer, and the
caption's way, which does not depend on time, is computed once. Nor does adaLN, whose vectors are computed beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..model.linear import Linear
from ..model.side_path import SidePath
from ..model.transformer import Transformer, is_time_weight

GROUP = "layers"
Pair = tuple[nn.Parameter, nn.Parameter]


class TrainedLora:
    """pairs: module -> A [rank, columns], B [rows, rank], float32, on the device. The update is B A: alpha is r."""

    def __init__(self, model: Transformer, rank: int, seed: int, device: torch.device) -> None:
        self.rank, self.pairs = rank, dict[str, Pair]()
        random = torch.Generator().manual_seed(seed)
        for name, linear in trained_linears(model).items():
            rows, columns = linear.weight.shape
            a = torch.empty(rank, columns).uniform_(-1, 1, generator=random) * math.sqrt(1 / columns)  # as peft does
            b = torch.zeros(rows, rank)
            self.pairs[name] = nn.Parameter(a.to(device)), nn.Parameter(b.to(device))
        self._linears = trained_linears(model)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [half for pair in self.pairs.values() for half in pair]

    @contextmanager
    def beside(self, block: str, dtype: torch.dtype) -> Iterator[None]:
        """Meanwhile the linears of a block that is bound ("layers.3") have it on their side, behind what is there."""
        own = {name: self._linears[name] for name in self.pairs if name.startswith(f"{block}.")}
        before = {name: linear.side for name, linear in own.items()}
        for name, linear in own.items():
            a, b = (half.to(dtype) for half in self.pairs[name])
            linear.side = _joined(linear.side, a, b)
        try:
            yield
        finally:
            for name, linear in own.items():
                linear.side = before[name]

    def state(self) -> dict[str, Tensor]:
        """On the CPU, float32."""
        return {
            f"{module}.lora_{half}.weight": tensor.detach().cpu()
            for module, pair in self.pairs.items()
            for half, tensor in zip("AB", pair, strict=True)
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for module, pair in self.pairs.items():
                for half, tensor in zip("AB", pair, strict=True):
                    tensor.copy_(state[f"{module}.lora_{half}.weight"])


def trained_linears(model: Transformer) -> dict[str, Linear]:
    """Module -> linear."""
    found = model.get_submodule(GROUP).named_modules()
    return {
        f"{GROUP}.{name}": module
        for name, module in found
        if isinstance(module, Linear) and not is_time_weight(f"{name}.weight")
    }


def _joined(side: SidePath | None, a: Tensor, b: Tensor) -> SidePath:
    if side is None:
        return SidePath(a=a, b=b)
    if side.a is None or side.b is None:
        return replace(side, a=a, b=b)
    return replace(side, a=torch.cat([side.a, a]), b=torch.cat([side.b, b], dim=1))
