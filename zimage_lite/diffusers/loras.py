"""LoRAs and their kin under diffusers' names: which there are, which of them are on, and how strong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from ..adapters.joined import AdapterSet
from ..config import Lora
from ..errors import UserError

Weight = float | dict[str, float] | None


class Loras:
    """named: by the names that the user gave, each at the strength at which it was set. of: opens them."""

    def __init__(self, of: Callable[[Sequence[Lora]], AdapterSet]) -> None:
        self._of = of
        self.named: dict[str, Lora] = {}
        self.active: list[str] = []
        self.enabled = True
        self._known: tuple[tuple[Lora, ...], AdapterSet] | None = None

    def load(self, path: str, name: str | None) -> None:
        """It alone is on from now on, as in diffusers. Raises UserError."""
        if name is None:
            name = next(own for n in count(len(self.named)) if (own := f"default_{n}") not in self.named)
        if name in self.named:
            raise UserError(f"the LoRA {name!r} is there already", fix="choose another adapter_name, or delete it")
        lora = Lora(path)
        self._of((lora,))
        self.named[name], self.active = lora, [name]

    def choose(self, names: str | Sequence[str], weights: Weight | Sequence[Weight] = None) -> None:
        """These are on, and no others. weights: of each, or of all; 1 if none is named."""
        names = [names] if isinstance(names, str) else list(names)
        self._require(names)
        each: Sequence[Any] = weights if isinstance(weights, list | tuple) else [weights] * len(names)
        if len(each) != len(names):
            raise UserError("adapter_weights", got=len(each), expected=f"{len(names)}, one for each name")
        chosen = {name: replace(self.named[name], strength=_strength(w)) for name, w in zip(names, each, strict=True)}
        self.named.update(chosen)
        self.active = names

    def delete(self, names: str | Sequence[str]) -> None:
        names = [names] if isinstance(names, str) else list(names)
        self._require(names)
        for name in names:
            del self.named[name]
        self.active = [name for name in self.active if name in self.named]

    def clear(self) -> None:
        self.named.clear()
        self.active, self.enabled = [], True

    def adapters(self, scale: float = 1.0) -> AdapterSet:
        """Those that are on, `scale` times as strong: the same object while they are the same."""
        active = [self.named[name] for name in self.active] if self.enabled else []
        loras = tuple(replace(lora, strength=scale * lora.strength) for lora in active)
        if self._known is None or self._known[0] != loras:
            self._known = loras, self._of(loras)
        return self._known[1]

    def forget(self) -> None:
        """Look at the files again, the next time."""
        self._known = None

    def _require(self, names: Sequence[str]) -> None:
        if unknown := [name for name in names if name not in self.named]:
            expected = f"of {', '.join(self.named)}" if self.named else "none: no LoRA is loaded"
            raise UserError("adapter names", got=", ".join(map(str, unknown)), expected=expected)


def _strength(weight: Weight) -> float:
    """diffusers takes one for each component, and there is one here."""
    if isinstance(weight, dict):
        if set(weight) - {"transformer"}:
            raise UserError("adapter_weights", got=", ".join(weight), expected="a number, or one for the transformer")
        weight = weight.get("transformer")
    return 1.0 if weight is None else float(weight)
