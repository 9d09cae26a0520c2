"""What is to be drawn, from the command line and from files of prompts."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ..adapters.tags import with_tags
from ..checkpoint.output import identity
from ..config import NO_MASK, RANDOM_SEED, GenerateOptions
from ..errors import UserError

_MAX_IMAGES = 10_000
_LINE = 'an object on each line, such as {"prompt": "...", "seed": 1}'
_RANDOM = "random"
_NUMBER = (int, float)
_TEXTS = (str, list)
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "prompt": str, "seed": int, "width": int, "height": int, "steps": int, "guidance": _NUMBER, "cfg": _NUMBER,
    "negative": str, "loras": list, "shift": _NUMBER, "sampler": str, "schedule": str, "sigmas": list,
    "variation": _NUMBER, "guidance_range": list, "cfg_normalization": _NUMBER, "cfg_truncation": _NUMBER, "image": str,
    "mask": str, "strength": _NUMBER, "strength_mode": str, "fit": str, "inpaint_area": str, "outpaint": list,
    "latents": str, "hires": _NUMBER, "hires_strength": _NUMBER, "controls": list, "control_image": _TEXTS,
    "control_from": _TEXTS, "control_start": _NUMBER, "control_end": _NUMBER, "control_math": str,
    "references": _TEXTS, "reference_positions": str,
}  # fmt: skip
_KINDS = {
    str: "a text", int: "a whole number", _NUMBER: "a number", list: "a list", _TEXTS: "a text or a list of them"
}  # fmt: skip
_SLASHES = "in JSON a backslash is written twice; a slash does as well"
_PICTURES = ("image", "mask", "control_image", "references")
_PATHS = (*_PICTURES, "latents", "loras", "controls")
_LISTS = {"sigmas": 0, "guidance_range": 2, "outpaint": 4}  # of so many numbers, any number if 0


class Seed(click.ParamType):
    """A whole number, or random."""

    name = "integer|random"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if str(value).lower() == _RANDOM:
            return RANDOM_SEED
        try:
            return int(value)
        except ValueError:
            self.fail(f"got {value!r}, expected a whole number or random", param, ctx)


def requests_of(
    prompts: Sequence[str], prompt_file: Path | None, base: Mapping[str, Any], count: int, lora_dir: Path | None = None
) -> list[GenerateOptions]:
    """All images in order: every prompt `count` times, seeds counting up. base: settings of all of them, for lines of
    the file to complete: a --strength there may be meant for pictures here. lora_dir: where prompts' <lora:...> lie."""
    if not 1 <= count <= _MAX_IMAGES:
        raise UserError("--count", got=count, expected=f"a number from 1 to {_MAX_IMAGES}")
    if "seed" in base:
        base = {**base, "seed": GenerateOptions(seed=base["seed"]).seed}  # a random one is drawn once
    wanted = [GenerateOptions(**{**base, "prompt": prompt}) for prompt in prompts]
    if prompt_file:
        wanted += _read_prompts(prompt_file, base)
        if not wanted:
            raise UserError(f"{prompt_file}: no prompt", expected=_LINE)
    if not wanted:
        raise UserError("no prompt", fix='say what to draw, such as "a red circle"')
    wanted = [with_tags(request, lora_dir) for request in wanted]
    return [replace(request, seed=request.seed + i) for request in wanted for i in range(count)]


def _read_prompts(path: Path, base: Mapping[str, Any]) -> list[GenerateOptions]:
    requests = []
    for number, line in enumerate(lines_of(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON", expected=_LINE, fix=_SLASHES if "\\" in line else None) from error
        if not isinstance(values, dict) or "prompt" not in values:
            raise UserError(where, got=line[:60], expected=_LINE)
        requests.append(_request(values, base, where))
    return requests


def lines_of(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")  # JSON may hold what splitlines would split at
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text in UTF-8", fix="save it as UTF-8") from error


def _request(values: dict[str, Any], base: Mapping[str, Any], where: str) -> GenerateOptions:
    """base, but for what the line says itself."""
    if str(values.get("seed")).lower() == _RANDOM:
        values["seed"] = RANDOM_SEED
    for name, value in values.items():
        if name not in _FIELDS:
            raise UserError(f"{where}: {name}", got=repr(value)[:60], expected=f"one of {', '.join(_FIELDS)}")
        if not _fits(value, _FIELDS[name]):
            raise UserError(f"{where}: {name}", got=repr(value)[:60], expected=_KINDS[_FIELDS[name]])
        if name in _PATHS and _is_eaten(value):
            raise UserError(f"{where}: {name}", got=repr(value)[:60], expected="a path", fix=_SLASHES)
    for name in _LISTS.keys() & values.keys():
        values[name] = _numbers(values[name], _LISTS[name], f"{where}: {name}")
    instead = {"cfg", "guidance"} if {"cfg", "guidance"} & values.keys() else set()  # two names of one setting
    if values.get("controls") == []:
        instead |= {"control_image"}  # a line without any of the command line's ControlNets
    try:
        request = GenerateOptions(**{**{name: base[name] for name in base.keys() - instead}, **values})
        _require_pictures(request, values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return request


def _require_pictures(request: GenerateOptions, named: Collection[str]) -> None:
    """Raise UserError for what is none: before the first line is drawn, and not when its turn comes."""
    from ..pictures.reading import require_picture

    for name in _PICTURES:
        for source in _files(request, name) if name in named else ():
            require_picture(source)


def _files(request: GenerateOptions, name: str) -> list[str | Path]:
    """That a setting names."""
    value = getattr(request, name)
    named = value if isinstance(value, list | tuple) else [value]
    return [one for one in named if isinstance(one, str | Path) and one != NO_MASK]


def require_apart(outputs: Iterable[Path], requests: Iterable[GenerateOptions]) -> None:
    """Raise UserError where what is written would replace what it is made from."""
    there = {identity(path): path for path in outputs}
    for request in requests:
        for name in (*_PICTURES, "latents"):
            for source in _files(request, name):
                if out := there.get(identity(source)):
                    flag = "--reference" if name == "references" else f"--{name.replace('_', '-')}"
                    raise UserError(f"{out} would be replaced, which {flag} names", fix="choose another name with -o")


def _is_eaten(value: Any) -> bool:
    r"""Whether a path has what JSON makes of C:\fox and C:\new, a form feed and a new line."""
    if isinstance(value, str):
        return any(char < " " for char in value)
    return isinstance(value, list) and any(map(_is_eaten, value))


def _fits(value: Any, kind: type | tuple[type, ...]) -> bool:
    if kind == _TEXTS and isinstance(value, list):
        return all(isinstance(one, str) for one in value)
    return isinstance(value, kind) and not isinstance(value, bool)


def _numbers(values: list[Any], count: int, where: str) -> tuple[float, ...]:
    numbers = all(isinstance(value, _NUMBER) and not isinstance(value, bool) for value in values)
    if not numbers or count not in (0, len(values)):
        raise UserError(where, got=repr(values)[:60], expected=f"a list of {count or 'some'} numbers")
    return tuple(values)
