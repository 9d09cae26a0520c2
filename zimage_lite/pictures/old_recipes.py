"""Recipes as version 0.1 wrote them first, all values texts: in a PNG a chunk for each, elsewhere one object."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from typing import Any

from ..config import GenerateOptions
from ..units import round_up
from .recipe import BESIDE, SOURCES

_LORA = re.compile(r"([^,(]+?):(-?[\d.e+-]+) \(([0-9a-f]{10})((?:, [\w.-]+ x -?[\d.e+-]+)*)\)")
_FILE = re.compile(r"(.*) \(([0-9a-f]{10})\)")
_KINDS: dict[str, Callable[[str], Any]] = {
    "int": int, "float": float, "tuple": lambda text: [float(part) for part in text.split(",")],
}  # fmt: skip
_OURS, _NOISE = "zimage-lite ", " (random weights: the picture is noise)"


def is_old(values: Mapping[str, Any]) -> bool:
    return str(values.get("version", "")).startswith(_OURS) and "prompt" in values


def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same as `pictures/recipe.py` writes it now. What cannot be read is left out."""
    found: dict[str, Any] = {"version": values["version"], "loras": _loras(str(values.get("loras", "")))}
    for field in fields(GenerateOptions):
        if field.name in SOURCES and field.name in values:
            file = _FILE.fullmatch(str(values[field.name]))
            found[field.name] = {"name": file[1], "sha256": file[2]} if file else str(values[field.name])
        elif field.name in values and field.name not in BESIDE:
            kind = _KINDS.get(re.split(r"\W", str(field.type))[0], str)
            with suppress(ValueError):
                found[field.name] = kind(str(values[field.name]))
    if size := re.fullmatch(r"(\d+)x(\d+)", str(values.get("size", ""))):
        found["size"] = [int(size[1]), int(size[2])]
        if "image" not in found and "latents" not in found:  # else its size is the picture's
            found["width"], found["height"] = (_before(int(pixels), found.get("hires")) for pixels in size.groups())
    model = str(values.get("model", ""))
    found["model"] = {"name": model.removesuffix(_NOISE), "format": str(values.get("format", ""))}
    return found | ({"model": {**found["model"], "synthetic": True}} if model.endswith(_NOISE) else {})


def _before(pixels: int, hires: float | None) -> int:
    """Of a side that was enlarged."""
    return round_up(round(pixels / hires) - 8, 16) if hires else pixels


def _loras(text: str) -> list[dict[str, Any]]:
    found = []
    for name, strength, sha256, blocks in _LORA.findall(text):
        lora = {"name": name.strip(), "strength": float(strength), "sha256": sha256}
        own = {part.rpartition(" x ")[0]: float(part.rpartition(" x ")[2]) for part in blocks.split(", ")[1:]}
        found.append({**lora, "blocks": own} if own else lora)
    return found
