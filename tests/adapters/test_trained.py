"""A LoRA that does something: it was trained on the demo (tools/train_demo_lora.py), and taught it a colour."""

from __future__ import annotations

from pathlib import Path

import pytest
from demo_judge import judge
from demo_scenes import COLOURS, Scene, Thing, held_out_captions
from PIL import Image
from train_demo_lora import ORANGE

from zimage_lite import GenerateOptions, load, quantize
from zimage_lite.config import Lora

FILE = Path(__file__).parents[1] / "data" / "orange_lora.safetensors"
GROUNDS, SHAPES = ("blue", "white", "black", "green"), ("circle", "square", "ring", "diamond")
KNOWN = held_out_captions("one", count=12)


def right(model: str | Path, asked: list[tuple[str, Scene]], strength: float) -> int:
    requests = [
        GenerateOptions(caption, 64, 64, seed=seed, loras=(Lora(str(FILE), strength),))
        for seed, (caption, _) in enumerate(asked)
    ]
    drawn = load(model, device="cpu").generate(requests)
    pictures = [Image.fromarray(image.numpy()) for image in drawn]
    return sum(judge(picture, scene).all for picture, (_, scene) in zip(pictures, asked, strict=True))


@pytest.fixture
def orange(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Scene]]:
    """What the LoRA was taught, on backgrounds of the demo's own."""
    monkeypatch.setitem(COLOURS, "orange", ORANGE)
    return [
        (f"an orange {shape} on a {ground} background", Scene((ground,), (Thing(shape, "orange"),)))
        for ground, shape in zip(GROUNDS * 3, SHAPES[1:] * 4, strict=True)
    ]


@pytest.mark.parametrize("to", ["bf16", pytest.param("q4_0", marks=pytest.mark.slow)])
def test_the_new_appears_and_the_old_stays(orange: list[tuple[str, Scene]], tmp_path: Path, to: str) -> None:
    """Also on weights into which it could not be merged: their steps are larger than its changes."""
    model: str | Path = "demo"
    if to != "bf16":
        quantize("demo", tmp_path / to, to)
        model = tmp_path / to
    assert right(model, orange, 0.0) <= 1
    assert right(model, orange, 1.0) >= 9
    assert right(model, KNOWN, 1.0) >= 10
