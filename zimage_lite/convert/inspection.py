"""What a file or a folder holds, and what would be refused and why. Reads headers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import Checkpoint, components_in
from ..checkpoint.controlnets import names_of, said_of
from ..checkpoint.detect import COMPONENTS, CONTROLNET, KINDS, VISION
from ..checkpoint.impostors import no_such, refuse_cache_root
from ..checkpoint.model_files import find_component, open_model
from ..checkpoint.stored import StoredTensor
from ..config import OmniConfig
from ..errors import UserError
from .complete import open_complete
from .fidelity import GROUP_ORDER, group_of
from .merging import merged_before
from .output_file import RECIPE_KEY


@dataclass(frozen=True)
class Part:
    """One component, or the reason why it is refused.

    formats: name -> (tensors, bytes); groups: of tensors -> (formats, bytes); recipe: what made the file; merged:
    adapters in its weights; unused: names of tensors that are no part of the model; about: for people, what its authors
    say of using it.
    """

    name: str
    model: str = ""
    layout: str = ""
    tensors: int = 0
    bytes: int = 0
    formats: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    groups: Mapping[str, tuple[tuple[str, ...], int]] = field(default_factory=dict)
    recipe: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    refusal: str | None = None
    unused: tuple[str, ...] = ()
    about: str | None = None
    merged: tuple[Mapping[str, Any], ...] = ()


def inspect(path: Path) -> list[Part]:
    """One Part for a file or a component folder; one per component for a model folder, and one for the whole if the
    parts do not go together."""
    if not path.exists():
        raise no_such(path)
    if path.is_dir():
        refuse_cache_root(path)
    found = (_found(path, component) for component in (*COMPONENTS, VISION) if path.is_dir() or _holds_all(path))
    parts = [part for part in found if part is not None]
    if not parts:
        return [_part(path.name, path, None)]
    if path.is_dir() and not any(part.refusal for part in parts):
        try:
            open_model(path)
        except UserError as error:
            parts.append(Part(path.name, refusal=str(error)))
    return parts


def _holds_all(path: Path) -> bool:
    """Whether a file is an all-in-one checkpoint. What is no checkpoint at all is refused later, with a reason."""
    try:
        return len(components_in(path)) > 1
    except UserError:
        return False


def _found(model: Path, component: str) -> Part | None:
    """The component of a model folder, if it has one."""
    try:
        place = find_component(model, component)
    except UserError as error:
        return Part(component, refusal=str(error))
    return _part(component, place, component) if place else None


def _part(name: str, path: Path, component: str | None) -> Part:
    try:
        checkpoint = open_complete(path, component)
    except UserError as error:
        return Part(name, refusal=str(error))
    return Part(
        name,
        _kind(checkpoint),
        checkpoint.layout,
        len(checkpoint.tensors),
        checkpoint.nbytes,
        checkpoint.bytes_by_format(),
        _groups(checkpoint),
        checkpoint.metadata.get(RECIPE_KEY),
        asdict(checkpoint.config),
        merged=tuple(merged_before(checkpoint)),
        unused=checkpoint.unused,
        about=said_of(checkpoint.config, names_of(checkpoint)) if checkpoint.component == CONTROLNET else None,
    )


def _kind(checkpoint: Checkpoint) -> str:
    return "Z-Image Omni transformer" if isinstance(checkpoint.config, OmniConfig) else KINDS[checkpoint.component]


def _groups(checkpoint: Checkpoint) -> dict[str, tuple[tuple[str, ...], int]]:
    """Group of tensors -> the formats it is in, and its bytes."""
    found: dict[str, list[StoredTensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        found.setdefault(group_of(name), []).append(tensor)
    return {
        group: (tuple(sorted({tensor.format.name for tensor in found[group]})), sum(t.nbytes for t in found[group]))
        for group in GROUP_ORDER
        if group in found
    }
