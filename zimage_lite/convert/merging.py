"""Adapters merged into the weights that are converted, for those who want one file.

They are merged as rows are read, before anything is quantized: afterwards a weight of few bits would swallow a small
change (of one of 3 %, q4_0 keeps 5 %; int8 keeps 1 % of one of 0.3 %). The file's metadata says which are in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..adapters.joined import JoinedModule, merged
from ..adapters.library import AdapterLibrary
from ..adapters.updates import Dora
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.stored import StoredTensor
from ..config import Lora
from ..errors import UserError
from ..units import round_up
from .job import Note
from .output_file import MERGED_KEY


@dataclass(frozen=True)
class MergedTensor(StoredTensor):
    """A weight, or a vector, with what adapters add to it."""

    joined: JoinedModule | None = None

    @property
    def is_as_stored(self) -> bool:
        return False

    def read_float(self, start: int = 0, stop: int | None = None) -> Tensor:
        stop, joined = self.rows if stop is None else stop, self.joined
        assert joined is not None
        if not joined.is_linear or self.name.endswith(".bias"):
            wide = super().read_float(start, stop)
            place = joined.made()
            added = joined.side_in(place).bias if joined.is_linear else joined.delta_in(place)
            return wide if added is None else wide + added.view(wide.shape)
        side, unit = joined.side_in(joined.made()), joined.unit_rows
        low, high = start // unit * unit, min(round_up(stop, unit), self.rows)
        return merged(super().read_float(low, high), side.rows(low, high))[start - low : stop - low]


def with_merged(checkpoint: Checkpoint, loras: Sequence[Lora], note: Note, complete: bool = True) -> Checkpoint:
    """The same transformer, with the adapters merged in. complete: its weights are on the disk, not only its headers.

    Raises UserError for adapters that cannot be merged."""
    if not loras or checkpoint.component != "transformer":
        return checkpoint
    library = AdapterLibrary(checkpoint.config, note, checkpoint.tensors if complete else None)
    found = library.of(loras)
    modules = found.modules(torch.float32)
    dora = [one for joined in modules.values() for one, _ in joined.applied if isinstance(one.update, Dora)]
    if dora and not complete:
        fix = "download the model first"
        raise UserError("--merge-lora: a DoRA needs the whole model at hand", fix=fix)
    changed = dict(_merged_tensors(checkpoint, modules))
    names = json.dumps([*merged_before(checkpoint), *library.told(loras)])
    metadata = {**checkpoint.metadata, MERGED_KEY: names}
    return replace(checkpoint, tensors={**checkpoint.tensors, **changed}, metadata=metadata)


def merged_before(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The name, strength and hash of each adapter that a file of ours says is in its weights."""
    try:
        found = json.loads(checkpoint.metadata.get(MERGED_KEY, "[]"))
    except (ValueError, TypeError):
        return []
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _merged_tensors(checkpoint: Checkpoint, modules: dict[str, JoinedModule]) -> Iterator[tuple[str, MergedTensor]]:
    for module, joined in modules.items():
        names = [name for name in (module, f"{module}.weight", f"{module}.bias") if name in checkpoint.tensors]
        if "bias" in joined.shapes and f"{module}.bias" not in names:
            raise UserError(f"--merge-lora: {module} gets a bias, and the model has no place for one", fix="use --lora")
        for name in names:
            tensor = checkpoint.tensors[name]
            own = {field.name: getattr(tensor, field.name) for field in fields(StoredTensor)}
            yield name, MergedTensor(**own, joined=joined)
