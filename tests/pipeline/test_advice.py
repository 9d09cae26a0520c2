"""What is said of a request before it is drawn: once for each kind, and nothing where nothing is meant otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from zimage_lite.api import load
from zimage_lite.checkpoint.model_files import ModelFiles, open_model
from zimage_lite.config import GenerateOptions, SchedulerConfig
from zimage_lite.pipeline.advice import advice
from zimage_lite.pipeline.drawing import Pipeline

BASE, TURBO = SchedulerConfig(6.0), SchedulerConfig(3.0)
PLAIN = GenerateOptions("a red fox", steps=8, guidance=0.0, shift=3.0)


@pytest.fixture(scope="module")
def model(tiny: Path) -> ModelFiles:
    return open_model(tiny)


def told(model: ModelFiles, *requests: GenerateOptions) -> list[str]:
    return list(advice(requests, model))


def test_nothing_to_say(model: ModelFiles) -> None:
    plain = ("a red fox", "", "a (small) fox: red, 3:4, <3", "BREAKFAST", "the embedding layer")
    plain += ("a picture (16:9)", "a clock (at 10:30)", "a verse (John 3:16)")
    assert told(model, *(replace(PLAIN, prompt=prompt) for prompt in plain)) == []


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("a fox <lora:detail:0.8>", "<lora:detail:0.8>"),
        ("a (red:1.3) fox", "(red:1.3)"),
        ("a ((1girl, smiling:.9)) fox", "(1girl, smiling:.9)"),
        ("a fox BREAK snow", "BREAK"),
        ("a fox, embedding:easyneg", "embedding:easyneg"),
    ],
)
def test_markup_is_text(prompt: str, read: str, model: ModelFiles) -> None:
    (line,) = told(model, PLAIN, replace(PLAIN, prompt=prompt), replace(PLAIN, prompt=f"{prompt} again"))
    assert line.startswith(f"{read} is read as text")


def test_a_long_prompt_is_cut_where_it_says(model: ModelFiles) -> None:
    words = [f"word{number}" for number in range(400)]
    long = " ".join(words)
    (line,) = told(model, PLAIN, replace(PLAIN, prompt=long))
    (both,) = told(model, replace(PLAIN, prompt=long), replace(PLAIN, prompt=f"{long} more"))
    assert both.startswith("2 prompts are too long: the first has")
    tokens, used = model.tokenizer.cut(long)
    assert f"{tokens} tokens with its frame, 512 are used" in line and line.endswith(f"'...{used[-40:]}'")
    # What is used gives the same ids, and a letter more would not fit: the frame's end is cut with the rest.
    ids = model.tokenizer.encode(long)
    assert long.startswith(used) and len(ids) == 512 < tokens
    assert model.tokenizer._encoding(used).ids[: 512 - 5] == ids[: 512 - 5]
    assert model.tokenizer.cut("a red fox")[1] == "a red fox"


def test_guidance_on_turbo(model: ModelFiles) -> None:
    (line,) = told(model, replace(PLAIN, guidance=1.0))
    assert "--guidance 1 is cfg 2 in ComfyUI, where 1 is off" in line
    assert told(model, replace(PLAIN, negative="blue")) == ["--negative has no effect without --guidance"]


def test_what_goes_with_a_controlnet(model: ModelFiles) -> None:
    late = replace(PLAIN, control_start=0.5, control_from="canny")
    lines = [f"--control-{name} has no effect without --control" for name in ("from", "start")]
    assert told(model, PLAIN, late) == lines
    assert told(model, late, replace(PLAIN, controls="x.safetensors", control_image="x.png")) == []


def test_an_omni_is_no_turbo(omni_folder: Path) -> None:
    """Whether it is distilled, nobody has said."""
    assert told(open_model(omni_folder), replace(PLAIN, guidance=5.0)) == []


def test_base_is_drawn_as_base(model: ModelFiles) -> None:
    """features.md: 28 to 50 steps, guidance 3 to 5."""
    base = replace(model, scheduler=BASE)
    complete = Pipeline(base).complete(GenerateOptions("a red fox"))
    assert (complete.steps, complete.guidance, complete.shift) == (30, 4.0, 6.0)
    assert told(base, complete) == []
    assert told(base, replace(complete, steps=28)) == []
    (line,) = told(base, complete, replace(complete, steps=8, guidance=0.0))
    assert "undistilled" in line and "got 8 and 0" in line
    complete = Pipeline(model).complete(GenerateOptions("a red fox"))
    assert (complete.steps, complete.guidance, complete.shift) == (8, 0.0, 3.0)


@pytest.mark.slow
def test_whoever_draws_is_told_once(tiny: Path) -> None:
    """The same from Python as on the command line."""
    said: list[str] = []
    pipeline = load(tiny, device="cpu", tell=said.append)
    requests = [GenerateOptions("a <lora:x:1> fox", 64, 64, steps=1, seed=seed) for seed in (1, 2)]
    list(pipeline.images(requests))
    assert [line[:12] for line in said] == ["<lora:x:1> i"]
    Pipeline(pipeline.model, pipeline.options, said.append, advises=False).generate(requests[:1])
    assert len(said) == 1
