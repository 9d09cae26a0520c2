"""What one recipe says and another does not: whether a picture that is there is the one that is wanted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from ..config import GenerateOptions
from .recipe import BESIDE, SOURCES, settings

_HASH = "sha256"
_NAMES = ("name", "format", "autov3")  # of files, which may have been renamed; what is in them is told by the hash
_DEFAULTS = {field.name: field.default for field in fields(GenerateOptions) if field.name not in (*SOURCES, *BESIDE)}
# Of a recipe that does not name them. The model comes first: another one has another size, too.
_FILES: dict[str, Any] = {"model": {}, "parts": {}, "loras": [], "controls": []}


def difference(said: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first setting or file by which two recipes draw different pictures, and its two values; None if there is
    none. Not by versions, nor by what of the machine no recipe tells. A file's hash counts where both know it, else its
    name."""
    one, other = _complete(said), _complete(wanted)
    for name in dict.fromkeys([*other, *one]):
        for found in _differences(name, one.get(name), other.get(name)):
            return found
    return None


def _complete(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data, with what it leaves out."""
    sources = {name: recipe[name] for name in SOURCES if name in recipe}
    beside = {name: recipe.get(name, default) for name, default in _FILES.items()}
    return json.loads(json.dumps({**beside, **_DEFAULTS, **settings(recipe), **sources}))


def _differences(name: str, one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(one, dict) and isinstance(other, dict):
        known = _HASH in one and _HASH in other
        left_out = _NAMES if known else (_HASH,)
        for key in dict.fromkeys([*other, *one]):
            if key not in left_out and not (key == _HASH and _same_hash(one[key], other[key])):
                yield from _differences(f"{name}: {key}", one.get(key), other.get(key))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for first, second in zip(one, other, strict=True):
            yield from _differences(name, first, second)
    elif one != other:
        yield name, _short(one), _short(other)


def _same_hash(one: str, other: str) -> bool:
    """Older recipes have the first digits."""
    return one.startswith(other) or other.startswith(one)


def _short(value: Any) -> Any:
    """Of files, their names."""
    if isinstance(value, list):
        return [_short(one) for one in value]
    return value.get("name", value) if isinstance(value, dict) else value
