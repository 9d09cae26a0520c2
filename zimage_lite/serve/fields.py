"""What clients may ask for, by the names of `generate`: each field of a kind, all within the limits. What is not named
here is not offered, so a new setting that takes a path is none of a client's until somebody thought about it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ..config import FITS, INPAINT_AREAS, SAMPLERS, SCHEDULES, STRENGTH_MODES, GenerateOptions, Lora
from ..errors import UserError
from .catalog import Catalog
from .options import Limits
from .uploads import picture_of

PICTURES = ("image", "mask")
HELD_BACK = ("latents",)  # a file of the server's
ALIASES = {
    "negative_prompt": "negative", "num_inference_steps": "steps", "guidance_scale": "guidance", "cfg_scale": "cfg",
    "batch_size": "count", "n": "count",
}  # fmt: skip
_CHOICES = {
    "sampler": SAMPLERS, "schedule": SCHEDULES, "strength_mode": STRENGTH_MODES, "fit": FITS,
    "inpaint_area": INPAINT_AREAS,
}  # fmt: skip
_MOST_NUMBER = 2**63  # of any setting


class FieldError(UserError):
    """param: the field that is at fault, if it is one."""

    def __init__(self, text: str, param: str | None = None) -> None:
        super().__init__(text)
        self.param = param

    @classmethod
    def of(cls, error: UserError) -> FieldError:
        """What is said of an option of the command line, as of a field."""
        text = re.sub(r"--([a-z][a-z-]*)", lambda match: match[1].replace("-", "_"), str(error))
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


_TEXT = Kind("a text", lambda value: isinstance(value, str), {"type": "string"})
_WHOLE = Kind("a whole number", _is_whole, {"type": "integer"})
_NUMBER = Kind("a number", _is_number, {"type": "number"})
_BASE64 = Kind("a picture in base64", _TEXT.fits, {"type": "string", "contentEncoding": "base64"})


def _kind(annotation: str, name: str) -> Kind:
    plain = annotation.removesuffix(" | None")
    if name in PICTURES:
        return _BASE64
    if plain.startswith("tuple["):
        return _numbers(0 if "..." in plain else plain.count(",") + 1)
    kind = {"int": _WHOLE, "float": _NUMBER, "str": _TEXT}[plain]
    choices = {"enum": list(_CHOICES[name])} if name in _CHOICES else {}
    return replace(kind, schema={**kind.schema, **choices})


FIELDS: dict[str, Kind] = {
    field.name: _kind(str(field.type), field.name)
    for field in fields(GenerateOptions)
    if field.name not in ("loras", *HELD_BACK)
}
FIELDS |= {"cfg": _NUMBER, "count": _WHOLE, "model": _TEXT}
FIELDS["loras"] = Kind(
    'a list such as [{"name": "ink", "strength": 0.8}]',
    lambda value: isinstance(value, list),
    {"type": "array", "items": {"type": "object", "required": ["name"], "properties": {
        "name": {"type": "string"}, "strength": {"type": "number", "default": 1}}}},
)  # fmt: skip


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
        for name in PICTURES:
            if name in given:
                given[name] = picture_of(given[name], name, limits.picture_pixels)
        given["loras"] = _loras(given.get("loras", []), catalog, limits)
        request = catalog.tagged(GenerateOptions(**{"seed": -1, **given}))
        _require_small(request, limits)
        return model, [replace(request, seed=request.seed + number) for number in range(count)]
    except FieldError:
        raise
    except UserError as error:
        raise FieldError.of(error) from error
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
    """Of what it names: what it leaves open is the model's, or the picture's, which was looked at when it came."""
    left, top, right, bottom = request.outpaint or (0, 0, 0, 0)
    width, height = ((request.width or 16) + left + right, (request.height or 16) + top + bottom)
    pixels = width * height * (request.hires or 1) ** 2
    if max(width, height) > 2**14 or pixels > limits.drawn_pixels:
        most = f"at most {limits.drawn_pixels / 1e6:.1f} million pixels"
        raise FieldError(f"width, height: got {width} x {height}, expected {most}", "width")


def _loras(values: list[Any], catalog: Catalog, limits: Limits) -> tuple[Lora, ...]:
    if len(values) > limits.loras:
        raise FieldError(f"loras: got {len(values)}, expected at most {limits.loras}", "loras")
    found = []
    for value in values:
        if not isinstance(value, dict) or not set(value) <= {"name", "strength"}:
            raise FieldError(f"loras: got {value!r:.60}, expected {FIELDS['loras'].says}", "loras")
        found.append(Lora(str(catalog.lora(value.get("name"))), value.get("strength", 1.0)))
    return tuple(found)
