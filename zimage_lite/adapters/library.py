"""The adapters that a pipeline has met: opened once, and looked at again when their file changes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.hub import named_file
from ..checkpoint.stored import StoredTensor
from ..checkpoint.weight_files import WEIGHT_SUFFIXES
from ..config import Lora, OmniConfig, TransformerConfig
from ..errors import UserError
from ..units import counted
from .joined import AdapterSet
from .reading import Adapter, kinds, open_adapter


class AdapterLibrary:
    """config: of the transformer that they are for. weights: its own, which DoRA reads once before it is applied; None
    for plans alone, which apply nothing. tell: takes a line for each adapter: what of it is applied."""

    def __init__(
        self, config: TransformerConfig, tell: Callable[[str], None], weights: Mapping[str, StoredTensor] | None = None
    ) -> None:
        self.config, self.tell, self.weights = config, tell, weights
        self._open: dict[str, tuple[Adapter, tuple[str, str]]] = {}  # with their hashes

    def of(self, loras: Sequence[Lora]) -> AdapterSet:
        """Raises UserError for what cannot be applied. One of strength 0 costs nothing, but has to be one."""
        opened = [(self._opened(lora), lora) for lora in loras]
        found = AdapterSet(tuple((adapter, lora) for adapter, lora in opened if lora.strength))
        if self.weights is not None:
            found.measure(self.weights)
        return found

    def told(self, loras: Sequence[Lora]) -> list[dict[str, Any]]:
        """As plain data, for recipes: of each that is in force, as it was opened last. Raises as `of`."""
        for lora in loras:
            if lora.path not in self._open:
                self._opened(lora)
        return [_told(*self._open[lora.path], lora) for lora in loras if lora.strength]

    def _opened(self, lora: Lora) -> Adapter:
        config, (known, _) = self.config, self._open.get(lora.path, (None, ()))
        refiners = dict.fromkeys(_refiners(config), config.n_refiner_layers)
        lora.require_blocks({"layers": config.n_layers, **refiners})
        if known is None or not known.is_current:
            known = open_adapter(place_of(lora.path), config)
            self._open[lora.path] = known, known.checked()
            self.tell(said_of(known))
        return known


def _told(adapter: Adapter, hashes: tuple[str, str], lora: Lora) -> dict[str, Any]:
    sha256, body = hashes
    found = {"name": adapter.name, "strength": lora.strength, "sha256": sha256, "autov3": _kohya_hash(adapter) or body}
    return {**found, "blocks": dict(lora.blocks)} if lora.blocks else found


def _kohya_hash(adapter: Adapter) -> str:
    """What trainers of kohya's kin say it is, which A1111 believes."""
    said = str(adapter.metadata.get("sshs_model_hash", ""))
    return said if re.fullmatch("[0-9a-f]{64}", said) else ""


def place_of(path: str) -> Path:
    """A path as it is, OWNER/NAME[/FILE] of the Hub in its cache."""
    if Path(path).exists():
        return Path(path)
    if ended := next((end for end in WEIGHT_SUFFIXES if Path(path + end).exists()), None):
        raise UserError(f"{path}: no such file", fix=f"did you mean {path}{ended}?")
    if of_hub := named_file(path):
        return of_hub
    there = path
    while (there := there.rpartition(":")[0]) and not Path(there).exists():
        pass
    if there:
        raise UserError(f"{there}: strength", got=repr(path[len(there) + 1 :])[:40], expected="a number such as 0.8")
    return Path(path)


def said_of(adapter: Adapter) -> str:
    """For people: of what kind it is, how many of its modules are changed, and what of the file has no place."""
    done = len(adapter.modules)
    of_kinds = ", ".join(f"{kind} on {count}" for kind, count in kinds(adapter).items())
    left = f"; {counted(len(adapter.unused), 'tensor')} left out ({adapter.unused[0][:60]})" if adapter.unused else ""
    return f"{adapter.name}: {of_kinds} of {counted(done + len(adapter.unknown), 'module')}{left}"


def _refiners(config: TransformerConfig) -> tuple[str, ...]:
    seeing = ("siglip_refiner",) if isinstance(config, OmniConfig) else ()
    return ("noise_refiner", "context_refiner", *seeing)
