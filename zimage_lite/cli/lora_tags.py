"""<lora:NAME:0.8> in a prompt, as A1111 and its kin write it: taken out, and looked up in a folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from ..config import GenerateOptions, Lora
from ..errors import UserError

_TAG = re.compile(r"\s*<lora:(?P<name>[^:<>]+)(?P<numbers>(?::[^:<>]*)*)>", re.IGNORECASE)
_SUFFIXES = (".safetensors", ".sft")


def with_tags(request: GenerateOptions, folder: Path | None) -> GenerateOptions:
    """What the prompt names joins the request's LoRAs. Without a folder the prompt stays as it is."""
    if folder is None or not (tags := list(_TAG.finditer(request.prompt))):
        return request
    found = [Lora(str(_file(folder, tag["name"].strip())), _strength(tag)) for tag in tags]
    return replace(request, prompt=_TAG.sub("", request.prompt).strip(), loras=(*request.loras, *found))


def _strength(tag: re.Match[str]) -> float:
    """NAME:TEXT-ENCODER:TRANSFORMER, where one number stands for both, or te=0.5:unet=0.8. LoRAs of this model leave
    the text encoder alone."""
    numbers = [number.strip() for number in tag["numbers"].split(":") if number.strip()]
    named = [number.partition("=")[2] for number in numbers if number.startswith("unet=")]
    plain = [number for number in numbers if "=" not in number]
    chosen = (named or plain[1:2] or plain or ["1"])[0]
    try:
        return float(chosen)
    except ValueError:
        raise UserError(f"{tag[0].strip()}: strength", got=repr(chosen)[:40], expected="a number such as 0.8") from None


def _file(folder: Path, name: str) -> Path:
    known = dict(_adapters(folder))
    if name in known:
        return known[name]
    leaves = {path.stem: path for path in known.values()}  # of folders below, without their names
    if name in leaves:
        return leaves[name]
    near = get_close_matches(name, [*known, *leaves], n=1, cutoff=0.4)
    raise UserError(
        f"<lora:{name}>: no such file in {folder}",
        expected=f"one of its {len(known)} adapters" if known else "a folder with .safetensors files",
        fix=f"did you mean {near[0]}?" if near else None,
    )


def _adapters(folder: Path) -> Iterator[tuple[str, Path]]:
    """By their paths in the folder, without the ending, with slashes."""
    if not folder.is_dir():
        raise UserError(f"--lora-dir {folder}: no such folder")
    for path in sorted(folder.rglob("*")):
        if path.suffix in _SUFFIXES and not path.name.startswith("."):
            yield path.relative_to(folder).with_suffix("").as_posix(), path
