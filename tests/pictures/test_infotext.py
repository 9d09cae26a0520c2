"""A1111's text, as a parser that is not ours takes it, and by the rules of Civitai's (its automatic.metadata.ts)."""

from __future__ import annotations

import re
from io import BytesIO
from typing import Any

import pytest
import torch
from PIL import Image
from recipes import PROMPT, a_recipe
from sd_parsers import ParserManager
from sd_parsers.data import PromptInfo

from zimage_lite.config import SAMPLERS, SCHEDULES
from zimage_lite.pictures.infotext import SAMPLER_LABELS, SCHEDULE_LABELS, infotext, settings_of
from zimage_lite.pictures.saving import write

OPENED: list[Image.Image] = []  # and kept: sd_parsers knows a picture by where it lies, and takes the next for the last

LORAS = [
    {"name": "ink", "strength": 0.8, "sha256": "a" * 64, "autov3": "0123456789abcdef" * 4},
    {"name": "水 墨,v2", "strength": -1.5, "sha256": "b" * 64, "autov3": "f" * 64},
]
FULL = a_recipe(
    negative="blurry, bad: hands", guidance=3.1, sampler="euler_ancestral", schedule="karras", strength=0.6,
    loras=LORAS, model={"name": "Z-Image, by: us", "format": "bf16", "sha256": "0a1b2c3d4e5f" * 5 + "0000"},
)  # fmt: skip


def test_the_text_to_the_letter() -> None:
    assert infotext(FULL).split("\n") == [
        'a red fox, 你好 "quoted"',
        "and a line <lora:ink:0.8> <lora:水_墨_v2:-1.5>",
        "Negative prompt: blurry, bad: hands",
        "Steps: 8, Sampler: Euler a, Schedule type: Karras, CFG scale: 4.1, Seed: 7, Size: 1024x768, "
        'Model hash: 0a1b2c3d4e, Model: "Z-Image, by: us", Denoising strength: 0.6, Shift: 3, '
        'Lora hashes: "ink: 0123456789ab, 水_墨_v2: ffffffffffff", Version: zimage-lite 0.1.0',
    ]


def parsed(recipe: dict[str, Any], suffix: str) -> PromptInfo:
    file = BytesIO()
    write(file, suffix, torch.zeros(48, 64, 3, dtype=torch.uint8), recipe)
    OPENED.append(Image.open(BytesIO(file.getvalue())))
    found = ParserManager().parse(OPENED[-1])
    assert found is not None
    return found


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("prompt", [PROMPT, "une forêt d'été", "Steps: 3 of them"])
def test_sd_parsers_reads_it(suffix: str, prompt: str) -> None:
    found = parsed(a_recipe(prompt=prompt, negative="blurry", model={"name": "m", "format": "q8_0"}), suffix)
    (sampler,) = found.samplers
    assert (sampler.name, sampler.model.name) == ("Euler", "m")
    assert [said.value for said in (*sampler.prompts, *sampler.negative_prompts)] == [prompt, "blurry"]
    wanted = {"cfg_scale": "1", "seed": "7", "steps": "8", "scheduler": "Simple"}
    assert {key.lower().replace(" ", "_"): value for key, value in sampler.parameters.items()} == wanted
    assert found.metadata["Size"] == "1024x768"


def civitai(text: str) -> dict[str, str]:
    """Its rules for the last line: keys end at a colon, values at a comma, and what is quoted is keys and values."""
    (line,) = [line for line in text.split("\n") if line.startswith("Steps: ")]
    found, key, value, quoted = dict[str, str](), "", "", False
    for char in line + ",":
        if char == '"':
            found |= {key: value} if quoted else {}
            key, value, quoted = ("", "", False) if quoted else (key, "", True)
        elif char == ":" and not quoted:
            key, value = value.strip(), ""
        elif char == "," and not quoted:
            found |= {key: value.strip()} if key else {}
            key, value = "", ""
        else:
            value += char
    return found


def test_civitai_finds_model_and_loras() -> None:
    found = civitai(infotext(a_recipe(loras=LORAS[:1], model={**FULL["model"], "name": "mine"})))
    assert (found["Model"], found["Model hash"], found["Lora hashes"]) == ("mine", "0a1b2c3d4e", "ink: 0123456789ab")
    assert re.findall(r"<(lora|hypernet):([a-zA-Z0-9_.\-]+):([0-9.]+)>", infotext(FULL)) == [("lora", "ink", "0.8")]


def test_the_way_back() -> None:
    found = settings_of(infotext(FULL))
    tags = " <lora:ink:0.8> <lora:水_墨_v2:-1.5>"
    assert found.pop("prompt") == PROMPT + tags
    assert found.pop("model") == {"name": "Z-Image, by: us"} and found.pop("version") == "zimage-lite 0.1.0"
    assert found == {name: FULL[name] for name in found} and len(found) == 10


@pytest.mark.parametrize(
    ("line", "sampling"),
    [
        ("Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 1, Size: 512x768", ("dpmpp_2m", "karras", [])),
        ("Steps: 20, Sampler: DPM++ 2M SDE, Schedule type: Beta, Seed: 1", ("dpmpp_2m_sde", "beta", [])),
        ("Steps: 20, Sampler: Euler, Schedule type: Automatic, Seed: 1", ("euler", None, [])),
        ("Steps: 20, Sampler: UniPC, Schedule type: Simple, Seed: 1", (None, "simple", ["unipc"])),
        ("Steps: 20, Sampler: DDIM CFG++, Schedule type: Align Your Steps, Seed: 1", (None, None, 2)),
    ],
)
def test_as_others_write_it(line: str, sampling: tuple) -> None:
    found = settings_of(f"a cat\nNegative prompt: dog,\nfox\n{line}")
    assert (found["prompt"], found["negative"], found["steps"], found["seed"]) == ("a cat", "dog,\nfox", 20, 1)
    unknown = found.get("unknown", [])
    assert (found.get("sampler"), found.get("schedule")) == sampling[:2]
    assert unknown == sampling[2] or len(unknown) == sampling[2]


@pytest.mark.parametrize(
    "text", ["", "a cat", "a cat, Steps: many, Size: huge", "Seed: 1, Size: 5, CFG scale: 1", "\n"]
)
def test_no_settings(text: str) -> None:
    assert settings_of(text) == {}


def test_nonsense_in_their_place_is_left_out() -> None:
    found = settings_of("x\nSteps: -, Sampler: , Seed: 1e9, CFG scale: nan?, Size: 9999999999x1, Shift: three")
    assert found.keys() == {"prompt", "negative", "model", "version"}


def test_long_texts_of_strangers_are_quickly_read() -> None:
    """Keys have an end, or each letter would be tried as the start of one that goes on to the end of the line."""
    assert settings_of("Steps: 1, " + "a " * 200_000 + ', "' * 1000) == {}


def test_all_that_can_be_drawn_has_a_label() -> None:
    assert tuple(SAMPLER_LABELS) == SAMPLERS and tuple(SCHEDULE_LABELS) == SCHEDULES
