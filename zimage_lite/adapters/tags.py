"""<lora:NAME:0.8> in a prompt, as A1111 and its kin write it: taken out, and looked up in a folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from ..config import GenerateOptions, Lora
from ..errors import UserError

_TAG = re.compile(r"\s*<(?:lora|lyco):(?P<name>[^:<>]+)(?P<numbers>(?::[^:<>]*)*)>", re.IGNORECASE)
_SUFFIXES = (".safetensors", ".sft")


def with_tags(request: GenerateOptions, folder: Path | None) -> GenerateOptions:
    """What the prompt names joins the request's LoRAs. Without a folder the prompt stays as it is."""
    if folder is None:
        return request
    if not folder.is_dir():
        raise UserError(f"--lora-dir {folder}: no such folder")
    if not (tags := list(_TAG.finditer(request.prompt))):
        return request
    found = [Lora.of({"path": find(folder, tag["name"].strip()), "strength": _strength(tag)}) for tag in tags]
    return replace(request, prompt=without_tags(request.prompt), loras=(*request.loras, *found))


def without_tags(prompt: str) -> str:
    return _TAG.sub("", prompt).strip()


def _strength(tag: re.Match[str]) -> str:
    """NAME:TEXT-ENCODER:TRANSFORMER, or te=0.5:unet=0.8; what is said of the text encoder holds for the transformer
    where that is not named. LoRAs of this model leave the text encoder alone."""
    numbers = [number.strip() for number in tag["numbers"].split(":") if number.strip()]
    plain = [number for number in numbers if "=" not in number]
    named = dict(number.split("=", 1) for number in numbers if "=" in number)
    encoder = named.get("te", plain[0] if plain else "1")
    return named.get("unet", plain[1] if len(plain) > 1 else encoder)


def find(folder: Path, name: str) -> Path:
    """By its path in the folder or by its name alone; as it is spelled, else in any case, with its ending. Raises
    UserError."""
    files = dict(adapters_in(folder))
    known = {**{path.stem: path for path in files.values()}, **files}
    found = known.get(name) or {_loosely(own): path for own, path in known.items()}.get(_loosely(name))
    if found:
        return found
    near = get_close_matches(name, known, n=1, cutoff=0.4)
    raise UserError(
        f"<lora:{name}>: no such file in {folder}",
        expected=f"one of its {len(files)} adapters" if files else "a folder with .safetensors files",
        fix=f"did you mean {near[0]}?" if near else None,
    )


def _loosely(name: str) -> str:
    return re.sub(rf"({'|'.join(map(re.escape, _SUFFIXES))})$", "", name.replace("\\", "/").casefold())


def adapters_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """By their paths in the folder, without the ending, with slashes."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in _SUFFIXES and not path.name.startswith("."):
            yield path.relative_to(folder).with_suffix("").as_posix(), path
