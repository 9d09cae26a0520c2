"""A picture's settings as A1111 writes them, which is what Civitai and most readers of pictures know: the prompt,
`Negative prompt: ...`, and a last line of `Key: value` with commas between. Written and read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

SAMPLER_LABELS = {
    "euler": "Euler", "heun": "Heun", "res_multistep": "Res Multistep", "dpmpp_2m": "DPM++ 2M",
    "euler_ancestral": "Euler a", "lcm": "LCM", "dpmpp_2m_sde": "DPM++ 2M SDE", "er_sde": "ER SDE",
}  # fmt: skip
SCHEDULE_LABELS = {
    "simple": "Simple", "normal": "Normal", "sgm_uniform": "SGM Uniform", "beta": "Beta", "beta57": "Beta57",
    "bong_tangent": "Bong Tangent", "linear_quadratic": "Linear Quadratic", "kl_optimal": "KL Optimal",
    "karras": "Karras",
}  # fmt: skip
AUTO_V2, AUTO_V3 = 10, 12  # digits that are written of a model's SHA-256, and of an adapter's

_NEGATIVE = "Negative prompt:"
_PAIR = re.compile(r'\s*(\w[\w /-]{0,40}):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
_LEAST_PAIRS = 3  # in the last line, or it is one more line of the prompt


def infotext(recipe: Mapping[str, Any]) -> str:
    """What `pictures/recipe.py` makes of a picture, as A1111's text. LoRAs join the prompt, for there their strengths
    are looked for."""
    tags = "".join(f" <lora:{_plain(lora['name'])}:{lora['strength']:g}>" for lora in recipe["loras"])
    lines = [recipe["prompt"] + tags]
    if recipe["negative"]:
        lines.append(f"{_NEGATIVE} {recipe['negative']}")
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in _pairs(recipe)))
    return "\n".join(lines)


def _pairs(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    width, height = recipe["size"]
    yield "Steps", str(len(recipe["sigmas"]) - 1 if recipe.get("sigmas") else recipe["steps"])
    yield "Sampler", SAMPLER_LABELS[recipe["sampler"]]
    yield "Schedule type", SCHEDULE_LABELS[recipe["schedule"]]
    yield "CFG scale", f"{recipe['guidance'] + 1:g}"  # where 1 is off
    yield "Seed", str(recipe["seed"])
    yield "Size", f"{width}x{height}"
    if sha256 := recipe["model"].get("sha256"):
        yield "Model hash", sha256[:AUTO_V2]
    yield "Model", recipe["model"]["name"]
    if recipe.get("strength") is not None:
        yield "Denoising strength", f"{recipe['strength']:g}"
    yield "Shift", f"{recipe['shift']:g}"
    hashes = [(_plain(lora["name"]), lora.get("autov3")) for lora in recipe["loras"]]
    if known := [f"{name}: {digits[:AUTO_V3]}" for name, digits in hashes if digits]:
        yield "Lora hashes", ", ".join(known)
    yield "Version", recipe["version"]


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if set(value) & set(",:\n") else value


def _plain(name: str) -> str:
    """As a tag's name may be spelled: readers look for letters, digits, _, . and -."""
    return re.sub(r"[^\w.-]+", "_", name)


def settings_of(text: str) -> dict[str, Any]:
    """What such a text says, by our names; {} if its last line is not of the kind. LoRAs stay in the prompt, as tags.
    Values that mean nothing here are left out; a sampler or schedule that is not known here is under "unknown"."""
    lines = text.strip().splitlines()
    pairs = {key: _unquoted(value) for key, value in _PAIR.findall(lines[-1])} if lines else {}
    if len(pairs) < _LEAST_PAIRS or "Steps" not in pairs:
        return {}
    prompt, _, negative = "\n".join(lines[:-1]).partition(_NEGATIVE)
    found: dict[str, Any] = {"prompt": prompt.strip(), "negative": negative.strip()}
    for key, name, kind in (("Steps", "steps", int), ("Seed", "seed", int), ("Denoising strength", "strength", float)):
        with suppress(KeyError, ValueError):
            found[name] = kind(pairs[key])
    with suppress(KeyError, ValueError):
        found["guidance"] = round(max(float(pairs["CFG scale"]) - 1, 0), 6)
    with suppress(KeyError, ValueError):
        found["shift"] = float(pairs["Shift"])
    if size := re.fullmatch(r"(\d{1,6})x(\d{1,6})", pairs.get("Size", "")):
        found["width"], found["height"] = int(size[1]), int(size[2])
    found |= sampling_of(pairs.get("Sampler", ""), pairs.get("Schedule type", ""))
    found["model"] = {"name": pairs["Model"]} if "Model" in pairs else {}
    found["version"] = pairs.get("Version", "another program")
    return found


def sampling_of(sampler: str, schedule: str) -> dict[str, Any]:
    """Older texts have the schedule at the end of the sampler's name; one without a name is the sampler's own."""
    schedules = {label.lower(): name for name, label in SCHEDULE_LABELS.items()}
    samplers = {label.lower(): name for name, label in SAMPLER_LABELS.items()}
    sampler, schedule = sampler.lower(), schedule.lower()
    front, _, last = sampler.rpartition(" ")
    if sampler not in samplers and last in schedules:
        sampler, schedule = front, schedule or last
    asked = {"sampler": (sampler, samplers), "schedule": (schedule, schedules)}
    found: dict[str, Any] = {name: known[label] for name, (label, known) in asked.items() if label in known}
    unknown = [label for label, known in asked.values() if label and label != "automatic" and label not in known]
    return {**found, "unknown": unknown} if unknown else found


def _unquoted(value: str) -> str:
    if value.startswith('"') and value.endswith('"'):
        with suppress(ValueError):
            return str(json.loads(value))
    return value.strip()
