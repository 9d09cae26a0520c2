"""Our nodes in a real ComfyUI, over HTTP. Skipped where COMFYUI names none (see helpers/comfy_server.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from comfy_server import NODES, Comfy, FailedError
from PIL import Image, ImageDraw

from zimage_lite.checkpoint.model_card import DEMO, control_place
from zimage_lite.cli import run

pytestmark = pytest.mark.slow

PROMPT = "a red circle on a blue background"


def generate(comfy: Comfy, **inputs: Any) -> dict[str, dict[str, Any]]:
    """A prompt of Generate, its pictures saved by "image", its report shown by "report"."""
    more = inputs.pop("more", {})
    return {
        "draw": comfy.node("ZImageLiteGenerate", **{"prompt": PROMPT, "model": "demo", **inputs}),
        "image": comfy.node("SaveImage", images=["draw", 0]),
        "report": comfy.node("PreviewAny", source=["draw", 1]),
        **more,
    }


def drawn(comfy: Comfy, **inputs: Any) -> list[np.ndarray]:
    return comfy.pictures(comfy.run(generate(comfy, **inputs))["image"])


def by_command_line(folder: Path, *arguments: object) -> np.ndarray:
    out = folder / "picture.png"
    assert run(["generate", PROMPT, "--device", "cpu", "-o", str(out), *map(str, arguments)]) == 0
    return np.asarray(Image.open(out))


@pytest.mark.parametrize(
    ("inputs", "arguments"),
    [
        ({}, []),
        (
            {"cfg": 3.0, "negative": "a square", "sampler": "dpmpp_2m", "schedule": "beta", "steps": 5, "shift": 2.0},
            ["--cfg", 3, "--negative", "a square", "--sampler", "dpmpp_2m", "--schedule", "beta", "--steps", 5,
             "--shift", 2],
        ),
    ],
    ids=["plain", "guided"],
)  # fmt: skip
def test_the_picture_is_the_command_lines(
    comfy: Comfy, tmp_path: Path, inputs: dict[str, Any], arguments: list[object]
) -> None:
    found = drawn(comfy, seed=3, **inputs)
    assert np.array_equal(found[0], by_command_line(tmp_path, "--seed", 3, *arguments))


def test_a_picture_is_drawn_over_where_the_mask_says(comfy: Comfy, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[8:40, 16:64] = 255
    Image.fromarray(pixels).save(tmp_path / "given.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    # LoadImage makes a mask of what is transparent.
    Image.fromarray(np.dstack([pixels, 255 - mask])).save(comfy.base / "input" / "given.png")
    more = {"given": comfy.node("LoadImage", image="given.png")}
    found = drawn(comfy, image=["given", 0], mask=["given", 1], strength=0.8, more=more)
    picture, names = tmp_path / "given.png", tmp_path / "mask.png"
    wanted = by_command_line(tmp_path, "--image", picture, "--mask", names, "--strength", 0.8)
    assert np.array_equal(found[0], wanted) and np.array_equal(found[0][mask == 0], pixels[mask == 0])


def test_the_example_runs(comfy: Comfy, tmp_path: Path) -> None:
    prompt = json.loads((NODES / "example_workflows" / "api" / "generate.json").read_text(encoding="utf-8"))
    found = comfy.pictures(comfy.run(prompt)["2"])
    assert np.array_equal(found[0], by_command_line(tmp_path, "--seed", 3))


@pytest.mark.parametrize("made_of", ["map", "canny"])
def test_a_controlnet_of_a_file_follows_its_picture(comfy: Comfy, tmp_path: Path, made_of: str) -> None:
    file, canvas = control_place(DEMO), Image.new("RGB", (64, 64))
    place = comfy.base / "models" / "model_patches" / file.name
    if not place.exists():
        place.symlink_to(file)
    ImageDraw.Draw(canvas).polygon([(32, 8), (56, 54), (8, 54)], outline="white")
    canvas.save(comfy.base / "input" / "edges.png")
    more = {
        "edges": comfy.node("LoadImage", image="edges.png"),
        "control": comfy.node("ZImageLiteAddControl", control=file.name, image=["edges", 0], made_of=made_of),
    }
    found = drawn(comfy, seed=3, controls=["control", 0], more=more)
    source = [] if made_of == "map" else ["--control-from", made_of]
    edges = comfy.base / "input" / "edges.png"
    wanted = by_command_line(tmp_path, "--seed", 3, "--control", file, "--control-image", edges, *source)
    assert np.array_equal(found[0], wanted)
    assert not np.array_equal(found[0], by_command_line(tmp_path, "--seed", 3))


def test_loras_add_up_and_seeds_count_up(comfy: Comfy, tmp_path: Path) -> None:
    lora = comfy.base / "models" / "loras" / "hourglass.safetensors"
    first = comfy.node("ZImageLiteAddLora", lora=lora.name, strength=0.5)
    second = comfy.node("ZImageLiteAddLora", lora=lora.name, strength=0.25, loras=["first", 0])
    found = drawn(comfy, seed=3, count=2, loras=["second", 0], more={"first": first, "second": second})
    wanted = by_command_line(tmp_path, "--seed", 4, "--lora", f"{lora}:0.5", "--lora", f"{lora}:0.25")
    assert len(found) == 2 and np.array_equal(found[1], wanted)


def test_what_is_wrong_is_said_in_one_line(comfy: Comfy) -> None:
    with pytest.raises(FailedError, match="does not fit --ram"):
        comfy.run(generate(comfy, ram="10MB"))
    with pytest.raises(FailedError, match="the model has no Z-Image transformer"):
        comfy.run(generate(comfy, model="(the parts below)"))


def test_it_stops_when_it_is_told_to_and_draws_again(comfy: Comfy) -> None:
    ordered = comfy.order(generate(comfy, steps=1000, seed=99))
    while not any(item[1] == ordered for item in comfy.get("queue")["queue_running"]):
        pass  # until it is its turn
    comfy.post("interrupt", {"prompt_id": ordered})
    with pytest.raises(FailedError, match="interrupted"):
        comfy.wait(ordered)
    assert len(drawn(comfy, seed=5)) == 1


def test_nothing_stays_in_memory(comfy: Comfy) -> None:
    """The demo takes 28 MB."""
    process = psutil.Process(comfy.pid)
    for seed in range(100, 104):
        drawn(comfy, seed=seed)
    before = process.memory_info().rss
    for seed in range(110, 120):
        drawn(comfy, seed=seed)
    assert process.memory_info().rss - before < 10e6


def test_a_model_is_quantized_and_drawn_with(comfy: Comfy, tmp_path: Path) -> None:
    prompt = {"made": comfy.node("ZImageLiteQuantize", source="demo", to="int8", overwrite=True)}
    comfy.run(prompt)
    folder = comfy.base / "models" / "zimage_lite" / "demo-int8"
    assert folder.name in comfy.node("ZImageLiteGenerate", model=folder.name)["inputs"]["model"]
    found = drawn(comfy, seed=3, model=folder.name)
    assert np.array_equal(found[0], by_command_line(tmp_path, "--model", folder, "--seed", 3))


def test_a_file_is_quantized_beside_itself(comfy: Comfy, tiny: Path) -> None:
    place = comfy.base / "models" / "diffusion_models"
    (place / "small.safetensors").symlink_to(tiny / "transformer" / "diffusion_pytorch_model.safetensors")
    made = comfy.node("ZImageLiteQuantize", source="diffusion_models/small.safetensors", to="q8_0")
    shown = comfy.run({"made": made})
    assert (place / "small-q8_0.gguf").is_file() and "transformer to q8_0" in shown["made"]["text"][0]
    with pytest.raises(FailedError, match="exists"):
        comfy.run({"made": {**made, "inputs": {**made["inputs"], "effort": "fast"}}})
