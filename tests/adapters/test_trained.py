"""A LoRA that does something: it was trained on the demo (tools/train_demo_lora.py), and taught it a shape."""

from __future__ import annotations

from pathlib import Path

import demo_judge
import demo_scenes
import numpy as np
import pytest
from demo_judge import judge
from demo_scenes import Scene, Thing, held_out_captions, shape_mask
from PIL import Image
from train_demo_lora import HOURGLASS

from zimage_lite import GenerateOptions, Lora, load, quantize

FILE = Path(__file__).parents[1] / "data" / "hourglass_lora.safetensors"
COLOURS, GROUNDS = ("red", "yellow", "cyan", "purple"), ("blue", "white", "black")
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
def hourglasses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Scene]]:
    """What the LoRA was taught, and the judge with it."""
    monkeypatch.setitem(demo_scenes._OUTLINES, "hourglass", HOURGLASS)
    drawn = np.asarray(shape_mask(Thing("hourglass", "red", r=0.48), 256)) > 0
    monkeypatch.setitem(demo_judge._TEMPLATES, "hourglass", demo_judge._outline(drawn))
    return [
        (f"a {colour} hourglass on a {ground} background", Scene((ground,), (Thing("hourglass", colour),)))
        for colour in COLOURS
        for ground in GROUNDS
    ]


@pytest.mark.slow  # many pictures
@pytest.mark.parametrize("to", [pytest.param("bf16", marks=pytest.mark.full_size), "q4_0"])
def test_the_new_appears_and_the_old_stays(hourglasses: list[tuple[str, Scene]], tmp_path: Path, to: str) -> None:
    """Also on weights into which it could not be merged: their steps are larger than its changes."""
    model: str | Path = "demo"
    if to != "bf16":
        quantize("demo", tmp_path / to, to)
        model = tmp_path / to
    assert right(model, hourglasses, 0.0) <= 1
    assert right(model, hourglasses, 1.0) >= 9
    assert right(model, KNOWN, 1.0) >= 9  # of 12; 10 here, and 12 without
