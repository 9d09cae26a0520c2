"""An adapter as people write it: texts, paths, objects; and how strong it is where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from zimage_lite.config import GenerateOptions, Lora
from zimage_lite.errors import UserError

WRITTEN: dict[Any, Lora] = {
    "style.safetensors": Lora("style.safetensors", 1.0),
    "style.safetensors:0.8": Lora("style.safetensors", 0.8),
    "style.safetensors:-1": Lora("style.safetensors", -1.0),
    "a:b c:0": Lora("a:b c", 0.0),
    "a:b": Lora("a:b", 1.0),
    r"C:\loras\style.safetensors": Lora(r"C:\loras\style.safetensors", 1.0),
    r"C:\loras\style.safetensors:.5": Lora(r"C:\loras\style.safetensors", 0.5),
    ":0.5": Lora(":0.5", 1.0),
    "owner/name/file.safetensors:1e-1": Lora("owner/name/file.safetensors", 0.1),
    Path("a") / "b": Lora(str(Path("a") / "b"), 1.0),
}


@pytest.mark.parametrize("value", WRITTEN, ids=str)
def test_texts_and_paths(value: Any) -> None:
    assert Lora.of(value) == WRITTEN[value] == Lora.of(Lora.of(value))
    assert Lora.several([value]) == Lora.several(value) == (WRITTEN[value],)
    assert GenerateOptions(loras=value).loras == (WRITTEN[value],)


def test_objects() -> None:
    assert Lora.of({"path": "a:1"}) == Lora("a:1", 1.0)  # a text would take the end for a strength
    assert Lora.of({"path": "a", "strength": "0.5"}) == Lora("a", 0.5)
    made = Lora.of({"path": "a", "strength": 2, "blocks": {"layers.0-9": 0.5, "noise_refiner": 0}})
    assert made == Lora("a", 2.0, {"layers.0-9": 0.5, "noise_refiner": 0.0})
    assert hash(made) == hash(Lora("a", 2.0, {"layers.0-9": 0.5, "noise_refiner": 0.0}))


def test_none_at_all() -> None:
    assert Lora.several(None) == Lora.several(()) == ()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "a LoRA without a path"),
        (" ", "a LoRA without a path"),
        ({"path": ""}, "a LoRA without a path"),
        ("a:nan", "a: strength: got nan, expected a number from -100 to 100"),
        ("a:-inf", "a: strength: got -inf"),
        ("a:100.5", "a: strength: got 100.5"),
        ({"path": "a", "strength": True}, "a: strength: got True, expected a number such as 0.8"),
        ({"path": "a", "strength": None}, "a: strength: got None"),
        ({"path": "a", "strength": 10**400}, "a: strength: got 1000"),
        ({"path": "a", "weight": 1}, "loras: got .*expected .PATH"),
        ({"path": 3}, "loras: got"),
        ({"strength": 1}, "loras: got"),
        (("a", 0.5), "loras: got"),
        (3, "loras: got 3"),
        ({"path": "a", "blocks": {"layer.3": 1}}, "a: blocks: got 'layer.3', expected such as layers.0-9"),
        ({"path": "a", "blocks": {"layers.3": "much"}}, "a: layers.3: got 'much', expected a number"),
        ({"path": "a", "blocks": 3}, "loras: got"),
        ({"path": "a", "blocks": "layers"}, "loras: got"),
    ],
)
def test_one_line_says_what_is_wrong(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        Lora.of(value)
    assert len(str(refused.value)) < 200


def test_how_strong_it_is_where() -> None:
    lora = Lora("a", 2.0, {"layers.0-9": 0.5, "layers.3": -1, "noise_refiner": 0, "context_refiner.1": 3})
    strengths = {
        "layers.0.attention.to_q": 1.0, "layers.3.feed_forward.w1": -2.0, "layers.9.attention_norm1": 1.0,
        "layers.10.attention.to_q": 2.0, "noise_refiner.1.attention.to_q": 0.0, "cap_embedder.1": 2.0,
        "context_refiner.0.attention.to_q": 2.0, "context_refiner.1.attention.to_q": 6.0, "x_pad_token": 2.0,
    }  # fmt: skip
    assert {module: lora.on(module) for module in strengths} == strengths


def test_blocks_that_the_model_has() -> None:
    counts = {"layers": 30, "noise_refiner": 2, "context_refiner": 2}
    Lora("a", 1.0, {"layers.0-29": 1, "noise_refiner.1": 1, "context_refiner": 1}).require_blocks(counts)
    for name in ("layers.30", "layers.0-30", "layers.9-3", "noise_refiner.2"):
        with pytest.raises(UserError, match=rf"a: blocks: got {name}, expected blocks of \w+\.0-\d+$"):
            Lora("a", 1.0, {name: 1}).require_blocks(counts)
