"""A1111's fields as ours. Its clients send 20 to 50 steps and a cfg of 7 that nobody asked for: a distilled model takes
its own, unless the server is told to obey."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any

from ..config import SAMPLERS, SIZE_MULTIPLE, SchedulerConfig
from ..pictures.infotext import SCHEDULE_LABELS, sampling_of
from .fields import FieldError
from .uploads import picture_of, prepared_mask

_FITS = {0: "stretch", 1: "crop", 2: "pad", 3: "stretch"}  # of resize_mode


def translated(
    values: Mapping[str, Any], over_image: bool, scheduler: SchedulerConfig | None, most_pixels: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """-> our fields, and what is drawn otherwise than asked, as their extra_generation_params. scheduler: of a model
    whose own steps and cfg are kept to; None to obey. Raises FieldError."""
    take, extra = _Taker(values), dict[str, Any]()
    own: dict[str, Any] = {"prompt": take("prompt", str, ""), "negative": take("negative_prompt", str, "")}
    own["seed"], own["count"] = take("seed", int, -1), take("batch_size", int, 1) * take("n_iter", int, 1)
    if own["seed"] < 0:
        own["seed"] = -1
    steps, cfg = take("steps", int, 50), take("cfg_scale", float, 7.0)
    if scheduler is not None and not scheduler.undistilled:
        if steps > scheduler.steps:
            extra["Steps asked"], steps = steps, scheduler.steps
        if cfg > 1:
            extra["CFG scale asked"], cfg = cfg, 1.0
    own["steps"], own["cfg"] = steps, max(cfg, 1.0)
    for name in ("width", "height"):
        if (pixels := take(name, int, 0)) > 0:
            own[name] = max(round(pixels / SIZE_MULTIPLE), 1) * SIZE_MULTIPLE
            extra |= {f"{name} asked".capitalize(): pixels} if own[name] != pixels else {}
    own |= _sampling(take, extra)
    if over_image:
        own |= _picture(take, values, most_pixels)
    elif take("enable_hr", bool, False) and (factor := take("hr_scale", float, 2.0)) > 1:
        own["hires"] = factor
        own["hires_strength"] = min(max(take("denoising_strength", float, 0.35), 0.01), 1.0)
    return own, extra


class _Taker:
    """Takes fields of a kind. null is as if it were not there."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def __call__(self, name: str, kind: Callable[[Any], Any], default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            return default
        right = isinstance(value, str) if kind is str else isinstance(value, int | float) and abs(value) < 2**63
        if not right or (kind is int and value != int(value)):
            raise FieldError(f"{name}: got {value!r:.60}, expected {'a text' if kind is str else 'a number'}", name)
        return kind(value)


def _sampling(take: _Taker, extra: dict[str, Any]) -> dict[str, str]:
    """By label or by name; one that is not known is Euler."""
    asked = take("sampler_name", str, "") or take("sampler_index", str, ""), take("scheduler", str, "")
    named = asked[0] if asked[0] in SAMPLERS else None
    schedule = asked[1] if asked[1] in SCHEDULE_LABELS else None
    found = sampling_of(*asked)
    if unknown := [label for label in found.pop("unknown", []) if label not in (named, schedule)]:
        extra["Not known here"] = ", ".join(unknown)
    found |= {"sampler": named} if named else {}
    return {**found, **({"schedule": schedule} if schedule else {})}


def _picture(take: _Taker, values: Mapping[str, Any], most_pixels: int) -> dict[str, Any]:
    images = values["init_images"]
    if not isinstance(images, list):
        raise FieldError("init_images: expected a list of pictures in base64", "init_images")
    found: dict[str, Any] = {"image": _base64(picture_of(images[0], "init_images", most_pixels))}
    found["strength"] = min(max(take("denoising_strength", float, 0.75), 0.01), 1.0)
    found["fit"] = _FITS.get(take("resize_mode", int, 0), "stretch")
    if values.get("mask"):
        raw = picture_of(values["mask"], "mask", most_pixels)
        invert, blur = take("inpainting_mask_invert", int, 0), take("mask_blur", float, 4.0)
        found["mask"] = _base64(prepared_mask(raw, bool(invert), blur))
        found["inpaint_area"] = "mask" if take("inpaint_full_res", bool, True) else "picture"
    return found


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
