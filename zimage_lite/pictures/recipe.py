"""What it takes to draw a picture again, as plain data that goes into JSON: settings by their names, of files the names
and the SHA-256 of what is in them, never where they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..config import GenerateOptions

if TYPE_CHECKING:
    from ..checkpoint.model_files import ModelFiles

ALWAYS = ("prompt", "negative", "seed", "width", "height", "steps", "guidance", "shift", "sampler", "schedule")
_FIELDS = {field.name: field for field in fields(GenerateOptions)}
BESIDE = ("loras", "controls")  # files of weights, told by those who opened them
SOURCES = tuple(name for name, field in _FIELDS.items() if field.type == "Any")  # files, or what is in memory


def recipe(
    request: GenerateOptions, model: ModelFiles, size: tuple[int, int] | None = None,
    loras: Sequence[Mapping[str, Any]] = (), controls: Sequence[Mapping[str, Any]] = (), sha256: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """size: of the picture, which may be larger than what was asked for, once it is drawn; loras, controls: as the
    pipeline tells them; sha256: of the transformer's file, where it is one and known."""
    found: dict[str, Any] = {"version": f"zimage-lite {__version__}", **({"size": list(size)} if size else {})}
    found |= asked(request)
    found["loras"] = [dict(lora) for lora in loras]
    if controls:
        found["controls"] = [dict(net) for net in controls]
    found["model"] = {"name": model.name, "format": model.transformer.main_format}
    if model.synthetic:
        found["model"]["synthetic"] = True  # random weights: the picture is noise
    if sha256:
        found["model"]["sha256"] = sha256
    if model.replaced:
        found["parts"] = {part: _part(getattr(model, part)) for part in model.replaced}
    return found


def _part(part: Any) -> dict[str, str]:
    """Without its hash: that of a text encoder takes as long as some steps."""
    found = {"name": Path(part.source).name}
    return {**found, "format": part.main_format} if hasattr(part, "main_format") else found


def asked(request: GenerateOptions) -> dict[str, Any]:
    """All but LoRAs and ControlNets: what is always said, and what is not as it is by default."""
    found: dict[str, Any] = {}
    for name, field in _FIELDS.items():
        value = getattr(request, name)
        if name in SOURCES:
            found |= {} if value is None else {name: _source(value)}
        elif name in ALWAYS or (name not in BESIDE and value != field.default):
            found[name] = list(value) if isinstance(value, tuple) else value
    return found


def sources_told(request: GenerateOptions) -> dict[str, Any]:
    """What of that is about the files that it is made from."""
    return {name: value for name, value in asked(request).items() if name in SOURCES}


def settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What of it GenerateOptions takes as it is: all but files, which are known by name only."""
    names = _FIELDS.keys() - {*BESIDE, *SOURCES}
    return {name: value for name, value in recipe.items() if name in names}


def source_sha256(value: object) -> str | None:
    """Of a picture, mask or other file that is given as one; None for what is in memory in another way."""
    from ..checkpoint.hashes import sha256_of  # numpy, which `--help` need not load

    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, str | Path) and Path(value).is_file():
        return sha256_of(Path(value))
    return None


def _source(value: object) -> Any:
    """Name and hash. A text that names no file, such as the mask `none`, is kept; of several, each."""
    if isinstance(value, list | tuple):
        return [_source(one) for one in value]
    sha256 = source_sha256(value)
    if isinstance(value, str | Path) and sha256 is None:
        return Path(value).name
    named = {"name": Path(value).name} if isinstance(value, str | Path) else {}
    return {**named, **({"sha256": sha256} if sha256 else {})}
