"""Budgets: what is planned, that it is kept, and that the image does not depend on it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from control_files import save_control, tiny_config
from make_checkpoint import SIZES, write_diffusers, write_tokenizer
from oracles import PROMPT
from PIL import Image

from zimage_lite.checkpoint.model_files import open_model
from zimage_lite.cli import run
from zimage_lite.config import GenerateOptions, RuntimeOptions, TransformerConfig
from zimage_lite.errors import BudgetError
from zimage_lite.memory import hardware
from zimage_lite.memory.placement import GRANULE_BYTES
from zimage_lite.memory.plan import FILE
from zimage_lite.pipeline.drawing import Pipeline
from zimage_lite.units import parse_bytes

pytestmark = pytest.mark.slow  # pictures within many budgets


def smallest_named(line: str) -> str:
    match = re.search(r"the smallest that works is --ram (\S+)", line)
    assert match, line
    return match[1]


@pytest.fixture
def exact_rss(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the process took nothing yet, so that budgets can be named to the byte."""
    monkeypatch.setattr(hardware, "rss_bytes", lambda: 0)
    monkeypatch.setattr(hardware, "LOOPS_BYTES", 0)


@pytest.fixture(scope="module")
def models(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("budgets")
    for target in ("q8_0", "int8"):
        assert run(["quantize", str(tiny), "--to", target, "-o", str(folder / target)]) == 0
    return {"bf16": tiny, "q8_0": folder / "q8_0", "int8": folder / "int8"}


def draw(model: Path, out: Path, capsys: Any, *args: str) -> tuple[np.ndarray, dict[str, Any]]:
    """-> pixels, and what --json says."""
    command = ["generate", PROMPT, "--model", str(model), "--steps", "2", "--device", "cpu", "--json", "-o", str(out)]
    assert run([*command, "--width", "96", "--height", "64", *args]) == 0
    return np.asarray(Image.open(out)), json.loads(capsys.readouterr().out)


def denoising(result: dict[str, Any]) -> dict[str, Any]:
    return result["phases"]["denoise"]["planned"]


@pytest.mark.parametrize("name", ["bf16", "q8_0", "int8"])
def test_the_image_does_not_depend_on_the_budget(name: str, models, exact_rss, capsys, tmp_path: Path) -> None:
    image, result = draw(models[name], tmp_path / "free.png", capsys)
    assert image.std() > 1 and denoising(result)["blocks"]["device"] == 5
    most, before = denoising(result)["peak_ram_bytes"], 5
    for budget in (most - 1, most - GRANULE_BYTES - 1, most - 2 * GRANULE_BYTES - 1):
        limited, result = draw(models[name], tmp_path / "limited.png", capsys, "--ram", f"{budget}b")
        blocks = denoising(result)["blocks"]
        places = blocks["device"] + denoising(result)["slots"]
        assert places < before and blocks["device"] < 5 and blocks["device"] + blocks["file"] == 5
        before = places
        assert max(phase["planned"]["peak_ram_bytes"] for phase in result["phases"].values()) <= budget
        np.testing.assert_array_equal(limited, image)
    assert blocks["device"] == 0


def test_a_ceiling_for_what_is_not_there(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside a GPU both count, so only --vram can be idle."""
    command = ["generate", "cat", "--model", str(tiny), "--device", "cpu", "-o", str(tmp_path / "x.png")]
    size = ["--steps", "1", "--width", "16", "--height", "16"]
    assert run([*command, *size, "--vram", "1GB", "--ram", "8GB"]) == 0
    assert re.findall("note: (.*) has no effect", capsys.readouterr().err) == ["--vram"]


def test_only_what_will_run_is_planned(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents can be decoded, and prompts encoded, where the transformer does not fit."""

    def refuse(*_: object) -> None:
        raise AssertionError("planned")

    monkeypatch.setattr("zimage_lite.pipeline.denoise.ways_to_denoise", refuse)
    pipeline = Pipeline(open_model(tiny), RuntimeOptions("cpu"))
    assert pipeline.decode([torch.zeros(16, 4, 6)])[0].shape == (32, 48, 3)
    assert pipeline.encode(["cat"])[0].ndim == 2
    with pytest.raises(AssertionError, match="planned"):
        pipeline.generate([GenerateOptions("cat", 16, 16, steps=1)])


def test_plans_of_several_sizes_tell_the_largest(tiny: Path) -> None:
    """So that a measured peak is beside what was planned for it."""
    large, small = (GenerateOptions("cat", side, side, steps=1) for side in (128, 16))
    pipeline = Pipeline(open_model(tiny), RuntimeOptions("cpu"))
    found = []
    for requests in ([large], [large, small], [small, large]):
        pipeline.generate(requests)
        found.append({name: plan.fixed["latents"] for name, plan in pipeline.plans.items() if name == "denoise"})
    assert found[0] == found[1] == found[2]


def test_a_text_encoder_that_streams_gives_the_same_embedding(tiny: Path, exact_rss) -> None:
    pipeline = Pipeline(open_model(tiny), RuntimeOptions("cpu"))
    truth = pipeline.encode([PROMPT, "cat"])
    plan = pipeline.plans["encode"]
    streaming = replace(plan, homes=dict.fromkeys(plan.homes, FILE), slots=2, slot_bytes=GRANULE_BYTES)
    with torch.inference_mode():
        again = list(pipeline.encoding.run([PROMPT, "cat"], lambda *_: None, 0, streaming))
    assert all(map(torch.equal, again, truth))


def test_too_small_a_budget_names_one_that_works(tiny: Path, exact_rss, refused, capsys, tmp_path: Path) -> None:
    """512x512, where the last phase needs the most: the first refusal must speak for all three."""
    out = tmp_path / "out.png"
    size = ("--width", "512", "--height", "512", "--steps", "1")
    line = refused("generate", PROMPT, "--model", tiny, "--ram", "1MB", "-o", out, *size, code=3)
    assert "got 1.0 MB" in line and not out.exists()
    _, result = draw(tiny, out, capsys, "--ram", smallest_named(line), *size)
    peaks = [phase["planned"]["peak_ram_bytes"] for phase in result["phases"].values()]
    assert parse_bytes(smallest_named(line)) - 10**8 < max(peaks) <= parse_bytes(smallest_named(line))


@pytest.mark.parametrize("controlled", [pytest.param(False, marks=pytest.mark.full_size), True])
def test_the_peak_stays_under_the_budget(tmp_path: Path, controlled: bool) -> None:
    """A process of its own, a transformer of 440 MB, and a budget of 360 MB more than the process has at the start;
    beside a ControlNet of 180 MB of 400 MB."""
    model = tmp_path / "model"
    model.mkdir()
    config = TransformerConfig(dim=1152, n_layers=11, n_refiner_layers=1, n_heads=9, cap_feat_dim=128)
    write_diffusers(model, (config, *SIZES["tiny"][1:]), torch.bfloat16, seed=0)
    write_tokenizer(model / "tokenizer", "tiny")
    code = """
import sys, zimage_lite.pipeline.drawing
from zimage_lite.cli import main
from zimage_lite.memory.meter import rss_bytes
main(["generate", *sys.argv[2:], "--ram", f"{rss_bytes() + int(sys.argv[1])}b"])
"""
    args = f"{400 if controlled else 360}000000 cat --model {model} --steps 1 --device cpu --json".split()
    args += ["--width", "256", "--height", "256"] if controlled else ["--width", "64", "--height", "64"]
    if controlled:
        sizes = {"dim": 1152, "n_heads": 9, "n_refiner_layers": 1, "control_refiner_layers_places": (0,)}
        net = save_control(tmp_path / "net.safetensors", replace(tiny_config(places=(0, 3, 6, 9)), **sizes))
        Image.new("RGB", (64, 64)).save(tmp_path / "hint.png")
        args += ["--control", str(net), "--control-image", str(tmp_path / "hint.png")]
    command = [sys.executable, "-c", code, *args, "-o", str(tmp_path / "out.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert denoising(result)["blocks"]["file"] >= 8
    assert result["peak_rss_bytes"] <= result["planned_rss_bytes"]


def test_scripts_get_the_error_itself(tiny: Path) -> None:
    pipeline = Pipeline(open_model(tiny), RuntimeOptions("cpu", ram_bytes=10**6))
    with pytest.raises(BudgetError, match="the smallest that works is --ram"):
        pipeline.generate([GenerateOptions("cat", 64, 64)])
