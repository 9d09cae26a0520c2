"""The built-in model draws what it is told, in every format, and as diffusers draws it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from demo_judge import judge
from demo_scenes import held_out_captions, parse
from evaluate_demo import FIRST_SEED, diffusers_sampler
from oracles import psnr
from PIL import Image
from train_demo_control import judged

from zimage_lite import GenerateOptions, load, quantize
from zimage_lite.checkpoint.model_card import DEMO, control_place, default_size, model_folder
from zimage_lite.cli import run

CAPTIONS = held_out_captions("one", 24)
FORMATS = ["int8"]  # q4_0 draws as many in adapters/test_trained.py
FORMATS += [
    pytest.param(name, marks=pytest.mark.full_size)
    for name in ("q4_0", "bf16", "f16", "q8_0", "q4_k_m", "int4", "nf4", "q3_k_s", "q2_k", "fp8", "qint4", "bnb-int8")
]
LEAST_RIGHT = (
    22  # of 24; of 200 such captions 98 % are right, so 21 or fewer has a chance of 1 in 80 for an equal model
)


def draw(model: str | Path, count: int) -> list[torch.Tensor]:
    width, height = default_size(model_folder(model))
    requests = [
        GenerateOptions(caption, width, height, seed=FIRST_SEED + n) for n, (caption, _) in enumerate(CAPTIONS[:count])
    ]
    return load(model, device="cpu").generate(requests)


@pytest.fixture(scope="module")
def images() -> list[torch.Tensor]:
    return draw(DEMO, len(CAPTIONS))


def right(images: list[torch.Tensor]) -> int:
    scenes = [scene for _, scene in CAPTIONS]
    pictures = [Image.fromarray(image.numpy()) for image in images]
    return sum(judge(picture, scene).all for picture, scene in zip(pictures, scenes, strict=True))


@pytest.mark.slow  # many pictures
def test_draws_what_held_out_captions_ask(images: list[torch.Tensor]) -> None:
    assert right(images) >= LEAST_RIGHT
    assert right(images[1:] + images[:1]) <= 4  # the judge does look: each picture against the next one's caption


@pytest.mark.slow  # many pictures
@pytest.mark.parametrize("to", FORMATS)
def test_every_format_still_follows_the_prompt(images: list[torch.Tensor], tmp_path: Path, to: str) -> None:
    quantize(DEMO, tmp_path / to, to)
    drawn = draw(tmp_path / to, len(CAPTIONS))
    assert right(drawn) >= LEAST_RIGHT
    same = all(torch.equal(a, b) for a, b in zip(drawn, images, strict=True))
    assert same or to != "bf16"
    assert not same or to in ("bf16", "f16")  # float16 loses only the smallest weights: on some processors no pixel


@pytest.mark.slow  # the same pictures
def test_diffusers_draws_the_same(images: list[torch.Tensor]) -> None:
    sample = diffusers_sampler(model_folder(DEMO), steps=8)
    for n, (caption, _) in enumerate(CAPTIONS[:6]):
        truth = torch.from_numpy(np.array(sample(caption, FIRST_SEED + n)))
        assert psnr(images[n], truth, 255) >= 45


@pytest.mark.slow
def test_it_is_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    caption = "a red circle on a blue background"
    assert run(["generate", caption, "-o", str(tmp_path / "image.png"), "--device", "cpu"]) == 0
    (note,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert "demo" in note
    assert "--model" in note
    image = Image.open(tmp_path / "image.png")
    assert image.size == default_size(model_folder(DEMO))
    assert judge(image, parse(caption)).all


@pytest.mark.slow
def test_no_note_for_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", DEMO, "--to", "q8_0", "-o", str(tmp_path / "small")]) == 0
    assert run(["generate", "a red circle", "--model", str(tmp_path / "small"), "-o", str(tmp_path / "image.png")]) == 0
    assert "demo draws" not in capsys.readouterr().err
    assert Image.open(tmp_path / "image.png").size == default_size(model_folder(DEMO))  # the card travels along


def test_parts_without_a_model_are_not_mixed_with_the_demo(tmp_path: Path, refused) -> None:
    file = next((model_folder(DEMO) / "transformer").glob("*.safetensors"))
    assert "--model" in refused("generate", "cat", "--transformer", file, "-o", tmp_path / "image.png")


def test_it_is_small() -> None:
    sizes = {file: file.stat().st_size for file in model_folder(DEMO).rglob("*") if file.is_file()}
    control = sizes.pop(control_place(DEMO))
    assert sum(sizes.values()) <= 32_000_000 and control <= 8_000_000


@pytest.mark.slow  # many pictures
def test_its_controlnet_is_followed() -> None:
    """Place and outline; of 100 such captions 98 are, and 3 without it."""
    found = judged(DEMO, 8, None)
    assert found["followed"] >= 80 and found["without"] <= 25
