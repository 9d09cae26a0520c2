"""Budgets: what is planned, that it is kept, and that the image does not depend on it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from make_checkpoint import SIZES, write_diffusers, write_tokenizer
from oracles import PROMPT
from PIL import Image
from safetensors.torch import load_file, save_file

from zimage_lite.checkpoint.model_files import open_model
from zimage_lite.cli import run
from zimage_lite.config import GenerateOptions, RuntimeOptions, TransformerConfig
from zimage_lite.errors import BudgetError, UserError
from zimage_lite.memory import hardware
from zimage_lite.memory.hardware import ALLOCATOR_SLACK_BYTES, RAM_MARGIN_BYTES, Hardware
from zimage_lite.memory.machine import Machine
from zimage_lite.memory.meter import Meter, peak_rss_bytes, rss_bytes
from zimage_lite.memory.placement import GRANULE_BYTES
from zimage_lite.memory.plan import FILE, Plan
from zimage_lite.memory.planner import budgets_in_force, plan_phases
from zimage_lite.model.linear import Linear
from zimage_lite.pipeline import weights as loading
from zimage_lite.pipeline.drawing import Pipeline
from zimage_lite.plan.job import Job
from zimage_lite.plan.model_sizes import model_of
from zimage_lite.plan.prediction import phases
from zimage_lite.units import format_gb, parse_bytes

CPU = Hardware(torch.device("cpu"), torch.float32)


def smallest_named(line: str) -> str:
    match = re.search(r"the smallest that works is --ram (\S+)", line)
    assert match, line
    return match[1]


# Meter and units


def test_meter() -> None:
    meter, threads = Meter(), threading.active_count()
    with meter.phase("small"):
        time.sleep(0.03)
    with meter.phase("large"):
        held = torch.ones(50_000_000)
        time.sleep(0.1)
        del held
    with pytest.raises(ZeroDivisionError), meter.phase("failed"):
        raise ZeroDivisionError
    assert list(meter.phases) == ["small", "large"]
    small, large = meter.phases.values()
    assert 0.03 <= small["seconds"] < large["seconds"] and large["seconds"] >= 0.1
    assert large["peak_rss_bytes"] - small["peak_rss_bytes"] == pytest.approx(200e6, rel=0.1)
    assert rss_bytes() > 1e7
    assert peak_rss_bytes() >= large["peak_rss_bytes"] - 2e6  # the kernel adds up its threads' pages now and then
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("6GB", 6 * 10**9), ("6gb", 6 * 10**9), ("6G", 6 * 10**9), ("6 GiB ", 6 * 2**30), ("5.5GiB", 5.5 * 2**30),
     ("800MB", 8 * 10**8), ("1.5k", 1500), ("7b", 7), ("0.5KiB", 512), ("2TB", 2 * 10**12),
     ("4.1GB", 4_100_000_000), ("0.1kb", 100)],
)  # fmt: skip
def test_sizes(text: str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize(
    "text", ["", "GB", "0", "8", "8000000000", "0GB", "-1GB", "1e3", "6 XB", "6GBs", "1.2.3GB", "nan", "inf", "0.1b", "9" * 400, "6,5GB"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="not a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(12_310_000_000, "12.31 GB"), (10**9, "1.00 GB"), (3_400_000, "3.4 MB"), (0, "0.0 MB")]
)
def test_sizes_in_words(n_bytes: int, text: str) -> None:
    assert format_gb(n_bytes) == text


# Joining the two: budgets of whole runs


def test_what_is_free_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process holds already counts as free for it, and as held."""
    monkeypatch.setattr(hardware, "rss_bytes", lambda: 3 * 10**8)
    monkeypatch.setattr(hardware.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**10, total=2 * 10**10))
    there = hardware.machine_here(CPU)
    assert there.ram_free_bytes == 3 * 10**8 + 10**10 - RAM_MARGIN_BYTES and there.gpu is None
    assert there.process_bytes == 3 * 10**8 + ALLOCATOR_SLACK_BYTES
    given = budgets_in_force(there, ram_bytes=10**9)
    assert (given.ram_bytes, given.ram_limit) == (10**9, "--ram")
    for too_much in (None, 10**12):
        free = budgets_in_force(there, ram_bytes=too_much)
        assert free.ram_bytes == there.ram_free_bytes and not free.ram_limit.startswith("--")


def made(model: Path, ram_bytes: int = 10**10) -> tuple[loading.Component, Plan]:
    """The transformer of a tiny model, and how it is denoised once with 16 x 16 pixels within so much."""
    component, sizes = Pipeline(open_model(model)).denoising.component, model_of(open_model(model))
    there = Machine("test", 10**11, process_bytes=0)
    ways = phases(sizes, Job(16, 16, steps=1), there)[1]
    return component, plan_phases([ways], there, budgets_in_force(there, ram_bytes=ram_bytes))[0]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("budget", ["free", "tight"])
def test_a_component_gives_everything_back(tiny: Path, budget: str, fails: bool) -> None:
    component, plan = made(tiny)
    if budget == "tight":
        fixed = sum(plan.fixed.values())
        component, plan = made(tiny, ram_bytes=fixed + 2 * GRANULE_BYTES)
        assert not plan.resident and plan.slots <= 2
    transformer, threads = component.model, threading.active_count()
    blocks = [*transformer.noise_refiner, *transformer.layers]
    try:
        with loading.opened(component, plan, CPU) as weights:
            arena = weights._arena.untyped_storage()
            rest = packed(transformer)
            with weights.prelude(2) as stream:
                for _ in range(2):
                    assert [packed(transformer) - rest for _ in stream(transformer.context_refiner)] == [7, 7]
            with weights.passes(2) as stream:
                for _ in range(2):
                    counts = [packed(transformer) - rest for _ in stream(blocks)]
                if fails:
                    raise ZeroDivisionError
            # Seven linears each: that of the modulation is not among them.
            assert counts == ([7] * 5 if plan.streamed else [35] * 5)
            (_, moved) = weights.moved
            assert moved.read_bytes == sum(component.block_bytes[name] for name in plan.sizes) * (
                2 if plan.streamed else 1
            )
    except ZeroDivisionError:
        assert fails
    assert packed(transformer) == 0 and threading.active_count() == threads
    assert torch._C._storage_Use_Count(arena._cdata) == 1  # ours; `weights` and `stream`, too, are still here
    assert {parameter.device.type for parameter in transformer.parameters()} == {"meta"}


def test_what_cannot_be_read_is_told(tiny: Path, tmp_path: Path) -> None:
    """From the thread that reads to the one that computes."""
    shutil.copytree(tiny, tmp_path / "model")
    component, plan = made(tmp_path / "model")
    (file,) = (tmp_path / "model" / "transformer").glob("*.safetensors")
    with pytest.raises(UserError, match=r"ends early|cannot be read"), loading.opened(component, plan, CPU) as weights:
        os.truncate(file, file.stat().st_size // 2)
        with weights.passes(1) as stream:
            list(stream([*component.model.noise_refiner, *component.model.layers]))


def packed(module: torch.nn.Module) -> int:
    return sum(isinstance(part, Linear) and part.packed is not None for part in module.modules())


def test_weights_that_are_not_numbers_are_named(tiny: Path, tmp_path: Path, refused) -> None:
    (file,) = (tiny / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["layers.1.feed_forward.w3.weight"][5, 5] = float("nan")
    save_file(tensors, tmp_path / "damaged.safetensors")
    line = refused(
        "generate", "cat", "--model", tiny, "--transformer", tmp_path / "damaged.safetensors", "--width", 64,
        "--height", 64, "--steps", 1, "-o", tmp_path / "out.png",
    )  # fmt: skip
    assert "layers.1.feed_forward.w3.weight" in line and "damaged.safetensors" in line
    assert not (tmp_path / "out.png").exists()


@pytest.fixture
def exact_rss(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the process took nothing yet, so that budgets can be named to the byte."""
    monkeypatch.setattr(hardware, "rss_bytes", lambda: 0)


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
        assert blocks["device"] < before and blocks["device"] + blocks["file"] == 5
        before = blocks["device"]
        assert max(phase["planned"]["peak_ram_bytes"] for phase in result["phases"].values()) <= budget
        np.testing.assert_array_equal(limited, image)
    assert before == 0


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


def test_the_peak_stays_under_the_budget(tmp_path: Path) -> None:
    """A process of its own, a transformer of 440 MB, and a budget of 360 MB more than the process has at the start."""
    model = tmp_path / "model"
    model.mkdir()
    config = TransformerConfig(dim=1152, n_layers=11, n_refiner_layers=1, n_heads=9, cap_feat_dim=128)
    write_diffusers(model, (config, *SIZES["tiny"][1:]), torch.bfloat16, seed=0)
    write_tokenizer(model / "tokenizer", "tiny")
    code = """
import sys, zimage_lite.pipeline.drawing
from zimage_lite.cli import main
from zimage_lite.memory.meter import rss_bytes
main(["generate", *sys.argv[1:], "--ram", f"{rss_bytes() + 360_000_000}b"])
"""
    args = f"cat --model {model} --width 64 --height 64 --steps 1 --device cpu --json".split()
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
