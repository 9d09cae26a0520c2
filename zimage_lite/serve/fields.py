"""What clients may ask for, by the names of `generate`: each field of a kind, all within the limits. What is not named
here is not offered, so a new setting that takes a path is none of a client's until somebody thought about it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..config import (
    CONTROL_MATHS,
    CONTROL_SOURCES,
    DEFAULT_SIZE,
    FITS,
    INPAINT_AREAS,
    REFERENCE_POSITIONS,
    SAMPLERS,
    SCHEDULES,
    STRENGTH_MODES,
    ControlUse,
    GenerateOptions,
    Lora,
)
from ..errors import UserError
from .catalog import Catalog, UnknownError
from .options import Limits
from .uploads import picture_of, size_of

PICTURES = ("image", "mask", "control_image", "references")
HELD_BACK = ("latents",)  # a file of the server's
ALIASES = {
    "negative_prompt": "negative", "num_inference_steps": "steps", "guidance_scale": "guidance", "cfg_scale": "cfg",
    "batch_size": "count", "n": "count",
}  # fmt: skip
_CHOICES = {
    "sampler": SAMPLERS, "schedule": SCHEDULES, "strength_mode": STRENGTH_MODES, "fit": FITS,
    "inpaint_area": INPAINT_AREAS, "control_math": CONTROL_MATHS, "reference_positions": REFERENCE_POSITIONS,
}  # fmt: skip
_MOST_NUMBER = 2**63  # of any setting


class FieldError(UserError):
    """param: the field that is at fault, if it is one."""

    def __init__(self, text: str, param: str | None = None) -> None:
        super().__init__(text)
        self.param = param

    @classmethod
    def of(cls, said: str) -> FieldError:
        """What is said of an option of the command line, as of a field."""
        text = re.sub(r"--([a-z][a-z-]*)", lambda match: match[1].replace("-", "_"), said)
        param = re.match(r"([a-z_]+)", text)
        return cls(text, param[1] if param and param[1] in FIELDS else None)


@dataclass(frozen=True)
class Kind:
    says: str
    fits: Callable[[Any], bool]
    schema: Mapping[str, Any]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MOST_NUMBER


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MOST_NUMBER


def _numbers(count: int) -> Kind:
    def fits(value: Any) -> bool:
        return isinstance(value, list) and len(value) <= 1001 and all(map(_is_number, value))

    size = {"minItems": count, "maxItems": count} if count else {"maxItems": 1001}
    return Kind("a list of numbers", fits, {"type": "array", "items": {"type": "number"}, **size})


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_picture(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, dict) and set(value) == {"sha256"} and _is_text(value["sha256"]))


def _is_pictures(value: Any) -> bool:
    several = isinstance(value, list) and 0 < len(value) <= _MOST_SEVERAL
    return _is_picture(value) or (several and all(map(_is_picture, value)))


def _texts(value: Any) -> bool:
    return _is_text(value) or (
        isinstance(value, list) and 0 < len(value) <= _MOST_SEVERAL and all(map(_is_text, value))
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _named(number: str, example: str) -> Kind:
    """Files of the server's, each by its name and how strong it is."""
    properties = {"name": {"type": "string"}, number: {"type": "number"}}
    items = {"type": "object", "required": ["name"], "properties": properties, "additionalProperties": False}
    return Kind(
        f'a list such as [{{"name": "{example}", "{number}": 0.8}}]', _is_list, {"type": "array", "items": items}
    )


_MOST_SEVERAL = 8
_BASE64 = {"type": "string", "contentEncoding": "base64"}
_KEPT = {"type": "object", "required": ["sha256"], "properties": {"sha256": {"type": "string"}}}
_PICTURE = {"anyOf": [_BASE64, {**_KEPT, "additionalProperties": False}]}  # the hash of one that was sent before
_KINDS = {
    "int": Kind("a whole number", _is_whole, {"type": "integer"}),
    "float": Kind("a number", _is_number, {"type": "number"}),
    "str": Kind("a text", _is_text, {"type": "string"}),
}
_SEVERAL = Kind(
    "a picture in base64, or a list of them", _is_pictures, {"anyOf": [_PICTURE, {"type": "array", "items": _PICTURE}]}
)
_OWN = {
    "loras": _named("strength", "ink"),
    "controls": _named("scale", "union"),
    "image": Kind("a picture in base64", _is_picture, _PICTURE),
    "mask": Kind("a picture in base64", _is_picture, _PICTURE),
    "control_image": _SEVERAL,
    "references": _SEVERAL,
    "control_from": Kind(
        f"one of {', '.join(CONTROL_SOURCES)}, or a list of them", _texts,
        {"anyOf": [{"enum": list(CONTROL_SOURCES)}, {"type": "array", "items": {"enum": list(CONTROL_SOURCES)}}]},
    ),
}  # fmt: skip


def _kind(annotation: str, name: str) -> Kind:
    plain = annotation.removesuffix(" | None")
    if name in _OWN:
        return _OWN[name]
    if plain.startswith("tuple["):
        return _numbers(0 if "..." in plain else plain.count(",") + 1)
    choices = {"enum": list(_CHOICES[name])} if name in _CHOICES else {}
    return replace(_KINDS[plain], schema={**_KINDS[plain].schema, **choices})


FIELDS: dict[str, Kind] = {
    field.name: _kind(str(field.type), field.name) for field in fields(GenerateOptions) if field.name not in HELD_BACK
}
FIELDS |= {"cfg": _KINDS["float"], "count": _KINDS["int"], "model": _KINDS["str"]}


def asked_for(
    values: Mapping[str, Any], catalog: Catalog, limits: Limits, strict: bool = True
) -> tuple[str, list[GenerateOptions]]:
    """A model's name, and one request for each image, seeds counting up. strict: fields that are not known are refused,
    not ignored. Raises FieldError, UnknownError."""
    given = {ALIASES.get(name, name): value for name, value in values.items() if value is not None}
    for name in list(given):
        if name not in FIELDS:
            if strict:
                raise FieldError(f"{name[:60]}: there is no such field", name[:60])
            del given[name]
        elif not FIELDS[name].fits(given[name]):
            got = repr(given[name])[:60]
            raise FieldError(f"{name}: got {got}, expected {FIELDS[name].says}", name)
    if strict and "prompt" not in given:
        raise FieldError("prompt: there is none", "prompt")
    model, count = given.pop("model", catalog.models[0]), given.pop("count", 1)
    catalog.place_of(model)
    if not 1 <= count <= limits.images:
        raise FieldError(f"count: got {count}, expected a number from 1 to {limits.images}", "count")
    _require_short(given, limits)
    try:
        for name in given.keys() & set(PICTURES):
            given[name] = _pictures(given[name], name, limits, catalog)
        loras = _files(given.get("loras", []), "loras", "strength", limits.loras)
        nets = _files(given.get("controls", []), "controls", "scale", limits.controls)
        given["loras"] = [Lora(str(catalog.lora(name)), 1.0 if number is None else number) for name, number in loras]
        given["controls"] = [ControlUse(catalog.control(name), number) for name, number in nets]
        request = catalog.tagged(GenerateOptions(**{"seed": -1, **given}))
        _require_small(request, limits)
        return model, [replace(request, seed=request.seed + number) for number in range(count)]
    except (FieldError, UnknownError):
        raise
    except UserError as error:
        raise FieldError.of(catalog.shown(str(error))) from error
    except (TypeError, ValueError, OverflowError) as error:
        raise FieldError(f"the request cannot be read ({error})"[:200]) from error


def _require_short(given: Mapping[str, Any], limits: Limits) -> None:
    for name in ("prompt", "negative"):
        if len(given.get(name, "")) > limits.prompt_chars:
            got = f"{len(given[name])} characters"
            raise FieldError(f"{name}: got {got}, expected at most {limits.prompt_chars}", name)
    steps = len(given["sigmas"]) - 1 if given.get("sigmas") else given.get("steps", 1)
    if steps > limits.steps:
        raise FieldError(f"steps: got {steps}, expected at most {limits.steps}", "steps")


def _require_small(request: GenerateOptions, limits: Limits) -> None:
    """As it is named, or as the picture that it is made from is, which is drawn in at most twice the model's size."""
    width, height = request.width or 16, request.height or 16
    if request.references and request.image is None and not (request.width and request.height):
        width = height = DEFAULT_SIZE  # as large as the last of them, at most
    if isinstance(request.image, bytes | Path) and request.hires and not request.width:
        own = size_of(request.image)
        part = min(1.0, (2 * DEFAULT_SIZE**2 / (own[0] * own[1])) ** 0.5)
        width, height = (max(round(side * part), 16) for side in own)
    left, top, right, bottom = request.outpaint or (0, 0, 0, 0)
    width, height = width + left + right, height + top + bottom
    pixels = width * height * (request.hires or 1) ** 2
    if max(width, height) > 2**14 or pixels > limits.drawn_pixels:
        most = f"at most {limits.drawn_pixels / 1e6:.1f} million pixels"
        times = f", {request.hires:g} times as large" if request.hires else ""
        raise FieldError(f"width, height: got {width} x {height}{times}, expected {most}", "width")


def _pictures(value: Any, name: str, limits: Limits, catalog: Catalog) -> Any:
    if isinstance(value, list):
        return [_pictures(one, name, limits, catalog) for one in value]
    return (
        catalog.picture(value["sha256"]) if isinstance(value, dict) else picture_of(value, name, limits.picture_pixels)
    )


def _files(values: list[Any], name: str, number: str, most: int) -> list[tuple[object, Any]]:
    """Of each its name and its number, if it has one."""
    if len(values) > most:
        raise FieldError(f"{name}: got {len(values)}, expected at most {most}", name)
    for value in values:
        if not isinstance(value, dict) or not set(value) <= {"name", number}:
            raise FieldError(f"{name}: got {value!r:.60}, expected {FIELDS[name].says}", name)
    return [(value.get("name"), value.get(number)) for value in values]
