"""--like PICTURE: the settings that are in a picture, where the command line names no others."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..adapters.tags import find, without_tags
from ..checkpoint.model_card import control_name
from ..config import SIZE_MULTIPLE, ControlUse, Lora
from ..errors import UserError
from ..pictures.recipe import SOURCES, settings, source_sha256
from ..pictures.saving import recipe_of

_FLAGS = {"references": "--reference"}

# Given on the command line -> what of a picture's settings would contradict it.
_INSTEAD = {
    "cfg": ("guidance",), "image": ("latents",), "latents": ("image", "mask", "outpaint", "inpaint_area"),
    "steps": ("sigmas",), "schedule": ("sigmas",), "shift": ("sigmas",), "strength": ("sigmas",),
}  # fmt: skip


@dataclass(frozen=True)
class Liked:
    """prompts: the picture's; settings: what is to be drawn with, the command line's included."""

    picture: Path | None = None
    prompts: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None  # that drew it
    found: Sequence[str] = ()  # what is not as it was

    def notes(self, model: str) -> Iterator[str]:
        """What the user might not expect, when `model` draws."""
        if self.model not in (None, model):
            yield f"{self.picture} was drawn by {self.model}; this is {model}"
        yield from self.found


def liked(picture: Path, image: Mapping[str, Any], given: Collection[str], lora_dir: Path | None) -> Liked:
    """image: settings from the command line, those in `given` named there. Raises UserError for a picture that says
    nothing, and for what it was made from but does not hold: LoRAs, other pictures."""
    recipe, notes = recipe_of(picture), list[str]()
    if not recipe:
        fix = "name one that zimage-lite or A1111 wrote, as it was written"
        raise UserError(f"--like {picture}: it does not say how it was drawn", fix=fix)
    dropped = {name for option in given for name in _INSTEAD.get(option, ())}
    recipe = {name: value for name, value in recipe.items() if name not in dropped}
    if recipe.get("controls") and "controls" not in given:
        names = " and ".join(_name(net) for net in recipe["controls"])
        raise UserError(f"--like {picture}: drawn with the ControlNet {names}", fix="name it with --control")
    own = settings(recipe) | _sources(recipe, picture, image, given, notes)
    if not any(name in given or name in own for name in ("image", "latents")):
        own.pop("strength", None)  # others name it for enlarging too
    _fit_size(own, notes)
    notes += [f"{label} is not known here, and {picture} is drawn without it" for label in recipe.get("unknown", ())]
    prompt = own.pop("prompt", "")
    if "loras" not in given:
        own["loras"] = _loras(recipe, picture, lora_dir, notes)
        _require_folder(prompt, picture, lora_dir)
    elif lora_dir is None and "loras" not in recipe:
        prompt = without_tags(prompt)
    mine = {name: image[name] for name in given}
    if "controls" in given:
        mine["controls"] = _controls(recipe, picture, ControlUse.several(image["controls"]), notes)
    return Liked(picture, (prompt,) if prompt else (), {**own, **mine}, recipe.get("model", {}).get("name"), notes)


def _sources(
    recipe: Mapping[str, Any], picture: Path, image: Mapping[str, Any], given: Collection[str], notes: list[str]
) -> dict[str, Any]:
    """What it was made from is on the command line, is a word, or lies beside it or here, as it was."""
    found: dict[str, Any] = {}
    for name in SOURCES:
        said, flag = recipe.get(name), _FLAGS.get(name, f"--{name.replace('_', '-')}")
        if isinstance(said, str) and name not in given:
            found[name] = said
        elif said is not None:
            was = said if isinstance(said, list) else [said]
            if name not in given:
                if there := _beside(picture, was):
                    found[name] = there if isinstance(said, list) else there[0]
                    continue
                names = " and ".join(_name(one) for one in was)
                raise UserError(f"--like {picture}: made from {names}", fix=f"name it with {flag}")
            now = image[name] if isinstance(image[name], list | tuple) else [image[name]]
            others = [_name(one) for one, new in zip(was, now, strict=False) if not _is(new, one)]
            notes += [f"{picture} was made from another {flag}: {other}" for other in others]
    return found


def _beside(picture: Path, said: Sequence[object]) -> list[str] | None:
    """The files that a recipe names, if all of them lie beside the picture or here, as they were."""
    found = []
    for one in said:
        hashed = isinstance(one, Mapping) and one.get("sha256")
        places = [folder / Path(_name(one)).name for folder in (picture.parent, Path())] if hashed else []
        there = [place for place in places if place.is_file() and _is(place, one)]
        if not there:
            return None
        found.append(str(there[0]))
    return found


def _weights_of(path: Path) -> Path:
    """Of a PEFT folder, the file whose hash a recipe names."""
    if not path.is_dir():
        return path
    from ..adapters.reading import file_of

    return file_of(path)


def _name(said: object) -> str:
    return str(said.get("name", "a picture in memory")) if isinstance(said, Mapping) else str(said)


def _is(source: object, said: object) -> bool:
    """Whether what is given is what a recipe names by its hash, or by the first digits of it."""
    known = str(said.get("sha256", "")) if isinstance(said, Mapping) else ""
    return (source_sha256(source) or "").startswith(known)


def _fit_size(own: dict[str, Any], notes: list[str]) -> None:
    """Others draw in multiples of 8."""
    for name in ("width", "height"):
        pixels = own.get(name)
        if pixels and pixels % SIZE_MULTIPLE:
            own[name] = max(round(pixels / SIZE_MULTIPLE), 1) * SIZE_MULTIPLE
            notes.append(f"{name} {pixels} is no multiple of {SIZE_MULTIPLE}: {own[name]} is drawn")


def _loras(recipe: Mapping[str, Any], picture: Path, folder: Path | None, notes: list[str]) -> tuple[Lora, ...]:
    """By their names in `folder`."""
    found = []
    for lora in recipe.get("loras", ()):
        if folder is None:
            fix = "say where it lies with --lora-dir, or name what to draw with by --lora"
            raise UserError(f"--like {picture}: drawn with the LoRA {lora['name']}", fix=fix)
        path = find(folder, lora["name"])
        found.append(Lora(str(path), lora["strength"], lora.get("blocks", ())))
        if not _is(_weights_of(path), lora):
            notes.append(f"{path} is not the {lora['name']} that {picture} was drawn with")
    return tuple(found)


def _controls(
    recipe: Mapping[str, Any], picture: Path, given: Sequence[ControlUse], notes: list[str]
) -> tuple[ControlUse, ...]:
    """Those that are given, at the picture's scales where they name none."""
    was, found = recipe.get("controls", ()), list[ControlUse]()
    if len(was) != len(given):
        return tuple(given)
    for use, said in zip(given, was, strict=True):
        if (name := control_name(use.path)) != said["name"]:
            notes.append(f"{picture} was drawn with the ControlNet {said['name']}; this is {name}")
        found.append(replace(use, scale=said["scale"]) if use.scale is None else use)
    return tuple(found)


def _require_folder(prompt: str, picture: Path, folder: Path | None) -> None:
    if folder is None and without_tags(prompt) != prompt.strip():
        fix = "say where they lie with --lora-dir, or name what to draw with by --lora"
        raise UserError(f"--like {picture}: its prompt names LoRAs", fix=fix)
