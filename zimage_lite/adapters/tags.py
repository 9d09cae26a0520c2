"""<lora:NAME:0.8> in a prompt, as A1111 and its kin write it: taken out, and looked up in a folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from ..checkpoint.weight_files import ADAPTER_CONFIG, WEIGHT_SUFFIXES, is_weight_file
from ..config import GenerateOptions, Lora
from ..errors import UserError
from ..units import counted

_TAG = re.compile(r"\s*<(?:lora|lyco):(?P<name>[^:<>]+)(?P<numbers>(?::[^:<>]*)*)>", re.IGNORECASE)
_ENDING = re.compile(rf"({'|'.join(map(re.escape, WEIGHT_SUFFIXES))})$", re.IGNORECASE)


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
    """By its path in the folder or by its name alone, with or without its ending; as it is spelled, else in any case.
    Raises UserError for none, and for several that are spelled alike."""
    paths, wanted = list(_adapters(folder)), name.replace("\\", "/")
    spelled = [(path, _spellings(path)) for path in paths]
    for fold in (str, str.casefold):
        for same in zip(*(names for _, names in spelled), strict=True):
            found = [path for path, own in zip(paths, same, strict=True) if fold(own) == fold(wanted)]
            if len(found) > 1:
                several = " and ".join(path.as_posix() for path in found[:3])
                raise UserError(f"<lora:{name}>: {len(found)} files in {folder}", got=several, expected="one of them")
            if found:
                return folder / found[0]
    near = get_close_matches(name, [own for _, names in spelled for own in names[1::2]], n=1, cutoff=0.4)
    raise UserError(
        f"<lora:{name}>: no such file in {folder}",
        expected=f"one of its {counted(len(paths), 'adapter')}" if paths else "a folder with .safetensors files",
        fix=f"did you mean {near[0]}?" if near else None,
    )


def _spellings(path: Path) -> tuple[str, ...]:
    """From the narrowest on."""
    return tuple(spelling for name in (path.as_posix(), path.name) for spelling in (name, _ENDING.sub("", name)))


def adapters_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files and PEFT's folders, by their paths in the folder, without the ending, with slashes."""
    for path in _adapters(folder):
        yield _ENDING.sub("", path.as_posix()), folder / path


def _adapters(folder: Path) -> Iterator[Path]:
    """Their paths in the folder."""
    for path in sorted(folder.rglob("*")):
        if path.name == ADAPTER_CONFIG and path.parent != folder:
            yield path.parent.relative_to(folder)
        elif is_weight_file(path) and (path.parent == folder or not path.with_name(ADAPTER_CONFIG).exists()):
            yield path.relative_to(folder)
