"""What quantizers know of a model's inputs."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.container import Entry
from ..errors import FileFormatError, WrongModelError
from ..quant.inputs import Inputs
from ..quant.tensor import all_finite
from .statistics import AGAIN, input_of

_KEPT = 2  # inputs whose X^T X stay in memory: those that several threads work on


@dataclass(frozen=True)
class Calibration:
    """squares: input -> [columns] float32, the mean square of each channel; products: input -> where X^T X lies, and
    the rows it is of. config: of the transformer that drew, if the file says it."""

    path: Path
    config: Mapping[str, Any] | None
    squares: Mapping[str, Tensor]
    products: Mapping[str, tuple[Entry, float]] = field(default_factory=dict)
    prompts: int = 0
    _kept: OrderedDict[str, Inputs] = field(default_factory=OrderedDict, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False)

    def inputs_known(self, weight: str) -> bool:
        return input_of(weight) in self.squares

    def inputs(self, weight: str) -> Inputs | None:
        """Of a weight, by its canonical name; None: nothing is known of them."""
        name = input_of(weight)
        if name not in self.squares:
            return None
        with self._lock:
            if name not in self._kept:
                self._kept[name] = Inputs(self.squares[name], self._hessian(name))
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(name)
            return self._kept[name]

    def _hessian(self, name: str) -> Tensor | None:
        if name not in self.products:
            return None
        entry, rows = self.products[name]
        products = entry.read().view(torch.float32).view(entry.shape)
        if not all_finite(products):
            raise FileFormatError(f"{self.path}: {entry.name[:200]} holds NaN or infinite values", fix=AGAIN)
        return products.div_(rows)

    def require_fits(self, config: Mapping[str, Any], columns: Mapping[str, int]) -> None:
        """Raise WrongModelError unless the statistics are of such a model. columns: of its weights, by their
        names."""
        known = {name: columns[name] for name in columns if input_of(name) in self.squares}
        if not known:
            raise WrongModelError(f"{self.path}: holds nothing of this model's weights", expected="its own statistics")
        for name, wanted in known.items():
            if len(self.squares[input_of(name)]) != wanted:
                got = f"{len(self.squares[input_of(name)])} channels for {name}"
                raise WrongModelError(f"{self.path}: statistics of another model", got=got, expected=wanted)
        mine = json.loads(json.dumps(config))
        differs = [key for key in mine if self.config is not None and self.config.get(key) != mine[key]]
        if self.config is not None and differs:
            got, expected = (f"{differs[0]} {said.get(differs[0])}" for said in (self.config, mine))
            raise WrongModelError(f"{self.path}: statistics of another model", got=got, expected=expected)
