"""The adapters that a pipeline has met: opened once, and looked at again when their file changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.container import file_stamp
from ..checkpoint.hub import adapter_file, is_hub_id
from ..config import Lora, TransformerConfig
from ..units import counted
from .joined import AdapterSet
from .reading import Adapter, kinds, open_adapter


class AdapterLibrary:
    """transformer: that they are for. tell: takes a line for each adapter: what of it is applied."""

    def __init__(self, transformer: Checkpoint, tell: Callable[[str], None]) -> None:
        self.transformer, self.tell = transformer, tell
        self._open: dict[str, Adapter] = {}

    def of(self, loras: Sequence[Lora], measured: bool = True) -> AdapterSet:
        """Raises UserError for what cannot be applied. One of strength 0 costs nothing, but has to be one.

        measured: ready to be applied, for which DoRA reads the weights once."""
        opened = [(self._opened(lora.path), lora.strength) for lora in loras]
        found = AdapterSet(tuple((adapter, strength) for adapter, strength in opened if strength))
        if measured:
            found.measure(self.transformer.tensors)
        return found

    def told(self, loras: Sequence[Lora]) -> list[dict[str, Any]]:
        """As plain data, for recipes: of each that is in force."""
        found = [(self._opened(lora.path), lora.strength) for lora in loras if lora.strength]
        return [{"name": adapter.name, "strength": strength, "sha256": adapter.sha256} for adapter, strength in found]

    def _opened(self, path: str) -> Adapter:
        known = self._open.get(path)
        if known is None or file_stamp(known.file) != known.stamp:
            known = open_adapter(place_of(path), self.transformer.config)
            known.require_sound()
            self._open[path] = known
            self.tell(said_of(known))
        return known


def adapters_for(config: TransformerConfig, loras: Sequence[Lora]) -> AdapterSet:
    """For plans alone: opened, but not ready to be applied. Raises UserError."""
    return AdapterSet(tuple((open_adapter(place_of(lora.path), config), lora.strength) for lora in loras))


def place_of(path: str) -> Path:
    """A path as it is, OWNER/NAME[/FILE] of the Hub in its cache."""
    if Path(path).exists():
        return Path(path)
    owner, _, rest = path.partition("/")
    name, _, file = rest.partition("/")
    if is_hub_id(f"{owner}/{name}") and (not file or file.endswith(".safetensors")):
        return adapter_file(f"{owner}/{name}", file or None)
    return Path(path)


def said_of(adapter: Adapter) -> str:
    """For people: of what kind it is, how many of its modules are changed, and what of the file has no place."""
    done = len(adapter.modules)
    of_kinds = ", ".join(f"{kind} on {count}" for kind, count in kinds(adapter).items())
    left = f"; {counted(len(adapter.unused), 'tensor')} left out ({adapter.unused[0][:60]})" if adapter.unused else ""
    return f"{adapter.name}: {of_kinds} of {counted(done + len(adapter.unknown), 'module')}{left}"
