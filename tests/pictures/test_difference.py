"""Whether a picture that is there is the one that is wanted, by their recipes."""

from __future__ import annotations

from typing import Any

import pytest
from recipes import a_recipe

from zimage_lite.pictures.difference import difference

INK = {"name": "ink", "strength": 0.8, "sha256": "a" * 64, "autov3": "b" * 64}
UNION = {"name": "union", "scale": 0.7, "sha256": "c" * 64}
FOX = {"name": "fox.png", "sha256": "d" * 64}
TURBO = {"name": "Turbo", "format": "q4_k_m", "sha256": "e" * 64}
VAE = {"vae": {"name": "vae.safetensors", "format": "bf16"}}
WHOLE = a_recipe(loras=[INK], controls=[UNION], image=FOX, strength=0.5, variation=20.0, model=TURBO, parts=VAE)


@pytest.mark.parametrize(
    ("changes", "name", "got", "expected"),
    [
        ({"prompt": "x"}, "prompt", "x", WHOLE["prompt"]),
        ({"steps": 9}, "steps", 9, 8),
        ({"variation": 0.0}, "variation", 0.0, 20.0),
        ({"sampler": "heun"}, "sampler", "heun", "euler"),
        ({"loras": []}, "loras", [], ["ink"]),
        ({"loras": [{**INK, "strength": 0.5}]}, "loras: strength", 0.5, 0.8),
        ({"loras": [{**INK, "sha256": "f" * 64}]}, "loras: sha256", "f" * 64, "a" * 64),
        ({"loras": [{**INK, "blocks": {"layers": 0.0}}]}, "loras: blocks", {"layers": 0.0}, None),
        ({"controls": [{**UNION, "scale": 1.0}]}, "controls: scale", 1.0, 0.7),
        ({"image": {**FOX, "sha256": "0" * 64}}, "image: sha256", "0" * 64, "d" * 64),
        ({"model": {**TURBO, "sha256": "0" * 64}}, "model: sha256", "0" * 64, "e" * 64),
        ({"model": {"name": "Base", "format": "q4_k_m"}}, "model: name", "Base", "Turbo"),
        ({"model": {"name": "Turbo", "format": "q8_0"}}, "model: format", "q8_0", "q4_k_m"),
        ({"parts": {}}, "parts: vae", None, "vae.safetensors"),
        ({"parts": {"vae": {"name": "other", "format": "bf16"}}}, "parts: vae: name", "other", "vae.safetensors"),
    ],
)
def test_what_decides_a_picture(changes: dict[str, Any], name: str, got: Any, expected: Any) -> None:
    said = {**WHOLE, **changes}
    assert difference(said, WHOLE) == (name, got, expected)
    assert difference(WHOLE, said) == (name, expected, got)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": "zimage-lite 9", "size": [1, 1]},
        {"loras": [{**INK, "name": "renamed"}], "image": {**FOX, "name": "copy.png"}},
        {"model": {**TURBO, "name": "moved"}},
        {"model": {"name": "Turbo", "format": "q4_k_m"}},  # whose hash was not computed there
        {"loras": [{"name": "ink", "strength": 0.8, "sha256": "a" * 10}]},  # of the first version
        {"negative": "", "schedule": "simple", "guidance_range": [0, 1]},  # which are so by default
    ],
)
def test_what_does_not(changes: dict[str, Any]) -> None:
    assert difference({**WHOLE, **changes}, WHOLE) is None is difference(WHOLE, {**WHOLE, **changes})


def test_a_picture_that_says_nothing() -> None:
    found = difference({}, WHOLE)
    assert found and found == ("model: name", None, "Turbo")
