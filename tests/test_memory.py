"""Budgets: what is planned, that it is kept, and that the image does not depend on it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROMPT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from make_checkpoint import SIZES, write_diffusers, write_tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file

from zimage_lite import loading
from zimage_lite.checkpoint.checkpoint import Checkpoint, open_checkpoint
from zimage_lite.checkpoint.model_files import open_model
from zimage_lite.cli import run
from zimage_lite.config import GenerateOptions, RuntimeOptions, TransformerConfig
from zimage_lite.errors import BudgetError, UserError
from zimage_lite.memory.hardware import RAM_MARGIN_BYTES, Hardware
from zimage_lite.memory.meter import Meter, peak_rss_bytes, rss_bytes
from zimage_lite.memory.plan import Placement, plan_blocks
from zimage_lite.memory.streamer import Streamer
from zimage_lite.model.linear import Linear
from zimage_lite.model.transformer import Transformer
from zimage_lite.pipeline import Pipeline
from zimage_lite.units import format_gb, parse_bytes

CPU = Hardware(torch.device("cpu"), torch.float32, 10**10)
LISTS = {"context_refiner": 2, "noise_refiner": 2, "layers": 3}  # of the tiny model, in the order they run

# plan_blocks

SIZES_OF_BLOCKS = st.lists(st.integers(1, 10**9), max_size=40)
BYTES = st.integers(0, 2 * 10**10)
plan_settings = settings(derandomize=True, deadline=None, max_examples=300)


def plan(sizes: list[int], fixed: int, budget: int) -> Placement:
    return plan_blocks("phase", {f"block.{n}": size for n, size in enumerate(sizes)}, fixed, budget, "--ram")


def possible(sizes: list[int], fixed: int, budget: int) -> bool:
    return fixed + max(sizes, default=0) <= budget


@plan_settings
@given(SIZES_OF_BLOCKS, BYTES, BYTES)
def test_a_plan_keeps_its_budget(sizes: list[int], fixed: int, budget: int) -> None:
    if not possible(sizes, fixed, budget):
        with pytest.raises(BudgetError):
            plan(sizes, fixed, budget)
        return
    made = plan(sizes, fixed, budget)
    held, peak = fixed + sum(sizes[int(name.removeprefix("block."))] for name in made.resident), 0
    for n, size in enumerate(sizes):
        peak = max(peak, held + (size if f"block.{n}" in made.streamed else 0))
    assert peak <= made.predicted_bytes <= budget or not sizes
    assert made.predicted_bytes <= budget


@plan_settings
@given(SIZES_OF_BLOCKS, BYTES, BYTES)
def test_every_block_either_stays_or_streams(sizes: list[int], fixed: int, budget: int) -> None:
    if possible(sizes, fixed, budget):
        made = plan(sizes, fixed, budget)
        assert list(made.streamed) == [f"block.{n}" for n in range(len(sizes)) if f"block.{n}" not in made.resident]
        assert len(made.resident) + len(made.streamed) == len(sizes)


@plan_settings
@given(SIZES_OF_BLOCKS, BYTES, BYTES, BYTES)
def test_more_budget_never_keeps_fewer_blocks(sizes: list[int], fixed: int, budget: int, more: int) -> None:
    if possible(sizes, fixed, budget):
        assert len(plan(sizes, fixed, budget + more).resident) >= len(plan(sizes, fixed, budget).resident)


@plan_settings
@given(SIZES_OF_BLOCKS, BYTES, BYTES)
def test_all_stay_exactly_when_all_fit(sizes: list[int], fixed: int, budget: int) -> None:
    if possible(sizes, fixed, budget):
        assert (not plan(sizes, fixed, budget).streamed) == (fixed + sum(sizes) <= budget or not sizes)


@plan_settings
@given(SIZES_OF_BLOCKS, BYTES)
@example([100_000_000], 4_000_000_000)  # 4.1 * 10**9 is less than 4100000000 in binary
def test_the_smallest_budget_that_is_named_works(sizes: list[int], fixed: int) -> None:
    least = fixed + max(sizes, default=0)
    plan(sizes, fixed, least)
    if least == 0:
        return
    with pytest.raises(BudgetError) as caught:
        plan(sizes, fixed, least - 1)
    assert caught.value.exit_code == 3
    named = parse_bytes(smallest_named(str(caught.value)))
    assert least <= named < least + 10**8
    plan(sizes, fixed, named)


def smallest_named(line: str) -> str:
    match = re.search(r"the smallest that works is --ram (\S+)", line)
    assert match, line
    return match[1]


@pytest.mark.parametrize("kept", range(29))
def test_those_that_stay_are_spread_evenly(kept: int) -> None:
    made = plan([10] * 30, 100, 110 + 10 * kept)
    places = sorted(int(name.removeprefix("block.")) for name in made.resident)
    assert len(places) == kept
    gaps = {b - a for a, b in zip(places, [*places[1:], 30 + places[0]] if places else [], strict=True)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_planning_loads_no_torch() -> None:
    code = "import sys, zimage_lite.memory.plan; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Streamer


class Blocks:
    """Blocks a, b, c, ... and what happened to them. here: those that are loaded; most: how many were, at once."""

    def __init__(self, names: str, resident: str) -> None:
        self.log: list[str] = []
        self.here: set[str] = set()
        self.most = 0
        self.failing = ""
        streamed = tuple(name for name in names if name not in resident)
        made = Placement(frozenset(resident), streamed, 0)
        self.stream = Streamer(made, {ord(name): name for name in names}, self.load, self.unload)
        self.blocks = [ord(name) for name in names]

    def load(self, name: str, block: int) -> None:
        assert name == chr(block) and name not in self.here
        if name == self.failing:
            raise OSError("cannot be read")
        self.here.add(name)
        self.most = max(self.most, len(self.here))
        self.log.append(f"+{name}")

    def unload(self, block: int) -> None:
        self.here.remove(chr(block))
        self.log.append(f"-{chr(block)}")

    def run(self, stop_at: str = "") -> Iterator[str]:
        for block in self.stream(self.blocks):
            assert chr(block) in self.here
            self.log.append(chr(block))
            if chr(block) == stop_at:
                raise ZeroDivisionError
            yield chr(block)


def test_streamer() -> None:
    blocks = Blocks("abcde", resident="bd")
    assert list(blocks.run()) == list("abcde")
    assert "".join(blocks.log) == "+aa-a+bb+cc-c+dd+ee-e"
    blocks.log.clear()
    assert list(blocks.run()) == list("abcde")
    assert "".join(blocks.log) == "+aa-ab+cc-cd+ee-e"
    assert blocks.here == {"b", "d"} and blocks.most == 3


@pytest.mark.parametrize(("resident", "left"), [("", set()), ("ab", {"a", "b"}), ("abc", {"a", "b", "c"})])
def test_a_pass_that_fails_leaves_only_resident_blocks(resident: str, left: set[str]) -> None:
    blocks = Blocks("abc", resident)
    with pytest.raises(ZeroDivisionError):
        list(blocks.run(stop_at="c"))
    assert blocks.here == left
    assert list(blocks.run()) == list("abc")  # and the next pass works


def test_an_abandoned_pass_leaves_only_resident_blocks() -> None:
    blocks = Blocks("abcd", resident="a")
    started = blocks.stream(blocks.blocks)
    assert [chr(next(started)), chr(next(started))] == ["a", "b"]
    assert blocks.here == {"a", "b"}
    started.close()
    assert blocks.here == {"a"}


def test_a_block_that_cannot_be_loaded_is_tried_again() -> None:
    blocks = Blocks("abc", resident="b")
    blocks.failing = "b"
    with pytest.raises(OSError, match="cannot be read"):
        list(blocks.run())
    assert blocks.here == set()
    blocks.failing = ""
    assert list(blocks.run()) == list("abc")


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
     ("800MB", 8 * 10**8), ("1.5k", 1500), ("123", 123), ("7b", 7), ("0.5KiB", 512), ("2TB", 2 * 10**12),
     ("4.1GB", 4_100_000_000), ("0.1kb", 100)],
)  # fmt: skip
def test_sizes(text: str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize(
    "text", ["", "GB", "0", "0GB", "-1GB", "1e3", "6 XB", "6GBs", "1.2.3GB", "nan", "inf", "0.1b", "9" * 400, "6,5GB"]
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


def test_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for, where the machine has it; what counts against it includes what the process holds already."""
    monkeypatch.setattr(loading, "rss_bytes", lambda: 3 * 10**8)
    given = loading.budget(RuntimeOptions(ram_bytes=10**9), CPU)
    assert (given.total_bytes, given.used_bytes, given.limit) == (10**9, 3 * 10**8, "--ram")
    for too_much in (None, 10**12):
        free = loading.budget(RuntimeOptions(ram_bytes=too_much), CPU)
        assert free.total_bytes == 3 * 10**8 + 10**10 - RAM_MARGIN_BYTES
        assert not free.limit.startswith("--")
    gpu = Hardware(torch.device("cuda", 0), torch.bfloat16, 10**10, vram_free_bytes=7 * 10**9)
    given = loading.budget(RuntimeOptions(vram_bytes=6 * 10**9, ram_bytes=1), gpu)
    assert (given.total_bytes, given.used_bytes, given.limit) == (6 * 10**9, loading.CUDA_CONTEXT_BYTES, "--vram")
    free = loading.budget(RuntimeOptions(), gpu)
    assert free.total_bytes == 7 * 10**9 + loading.CUDA_CONTEXT_BYTES - loading.VRAM_MARGIN_BYTES


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("budget", ["free", "tight"])
def test_a_component_gives_everything_back(tiny: Path, budget: str, fails: bool) -> None:
    checkpoint = open_checkpoint(tiny / "transformer")
    transformer = Transformer(checkpoint.config)
    sizes, n_bytes = block_sizes(checkpoint), 10**9
    if budget == "tight":  # one block at a time
        with opened(transformer, checkpoint, n_bytes) as component:
            n_bytes = component.plan.predicted_bytes - sum(sizes.values()) + max(sizes.values())
    try:
        with opened(transformer, checkpoint, n_bytes) as component:
            assert component.plan.resident == (set(sizes) if budget == "free" else set())
            rest = packed(transformer)
            counts = [packed(transformer) - rest for _ in component.stream(transformer.layers)]
            assert counts == ([8, 16, 24] if budget == "free" else [8, 8, 8])  # linears of three layers
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert packed(transformer) == 0
    assert {parameter.device.type for parameter in transformer.parameters()} == {"meta"}


def opened(transformer: Transformer, checkpoint: Checkpoint, n_bytes: int) -> AbstractContextManager[loading.Loaded]:
    component = loading.Component(transformer, checkpoint, tuple(LISTS), working_bytes=0)
    return loading.loaded(component, CPU, loading.Budget(n_bytes, 0, "--ram"))


def block_sizes(tiny: Checkpoint) -> dict[str, int]:
    names = [f"{group}.{n}" for group, count in LISTS.items() for n in range(count)]
    return {name: sum(tensor.nbytes for tensor in tiny.under(name).values()) for name in names}


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
    monkeypatch.setattr(loading, "rss_bytes", lambda: 0)


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


@pytest.mark.parametrize("name", ["bf16", "q8_0", "int8"])
def test_the_image_does_not_depend_on_the_budget(name: str, models, exact_rss, capsys, tmp_path: Path) -> None:
    image, result = draw(models[name], tmp_path / "free.png", capsys)
    assert image.std() > 1
    assert result["plans"]["transformer"]["streamed"] == result["plans"]["text_encoder"]["streamed"] == 0
    blocks = block_sizes(open_checkpoint(models[name] / "transformer")).values()
    fixed = result["plans"]["transformer"]["predicted_bytes"] - sum(blocks)
    one_too_few = fixed + sum(blocks) - 1  # then two stream, for the slot that they pass through takes the room of one
    for budget, streamed in ((one_too_few, 2), (fixed + 3 * max(blocks), 5), (fixed + max(blocks), 7)):
        limited, result = draw(models[name], tmp_path / "limited.png", capsys, "--ram", f"{budget}b")
        made = result["plans"]["transformer"]
        assert (made["streamed"], made["resident"]) == (streamed, 7 - streamed)
        assert made["predicted_bytes"] <= budget
        np.testing.assert_array_equal(limited, image)


def test_a_text_encoder_that_streams_gives_the_same_embedding(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "rss_bytes", lambda: 0)
    model = open_model(tiny)
    free = Pipeline(model, RuntimeOptions("cpu"))
    truth = free.encode([PROMPT])[0]
    limited = Pipeline(model, RuntimeOptions("cpu", ram_bytes=free.plans["text_encoder"].predicted_bytes - 1))
    assert torch.equal(limited.encode([PROMPT])[0], truth)
    assert len(limited.plans["text_encoder"].streamed) == 2


def test_too_small_a_budget_names_one_that_works(tiny: Path, exact_rss, refused, capsys, tmp_path: Path) -> None:
    """512x512, where the last phase needs the most: the first refusal must speak for all three."""
    out = tmp_path / "out.png"
    size = ("--width", "512", "--height", "512", "--steps", "1")
    line = refused("generate", PROMPT, "--model", tiny, "--ram", "1MB", "-o", out, *size, code=3)
    assert "got 1.0 MB" in line and not out.exists()
    _, result = draw(tiny, out, capsys, "--ram", smallest_named(line), *size)
    assert max(made["predicted_bytes"] for made in result["plans"].values()) <= parse_bytes(smallest_named(line))


def test_the_peak_stays_under_the_budget(tmp_path: Path) -> None:
    """A process of its own, a transformer of 440 MB, and a budget of 360 MB more than the process has at the start."""
    model = tmp_path / "model"
    model.mkdir()
    config = TransformerConfig(dim=1152, n_layers=11, n_refiner_layers=1, n_heads=9, cap_feat_dim=128)
    write_diffusers(model, (config, *SIZES["tiny"][1:]), torch.bfloat16, seed=0)
    write_tokenizer(model / "tokenizer", "tiny")
    code = """
import sys, zimage_lite.pipeline
from zimage_lite.cli import main
from zimage_lite.memory.meter import rss_bytes
main(["generate", *sys.argv[1:], "--ram", f"{rss_bytes() + 360_000_000}b"])
"""
    args = f"cat --model {model} --width 64 --height 64 --steps 1 --device cpu --json".split()
    command = [sys.executable, "-c", code, *args, "-o", str(tmp_path / "out.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    made = result["plans"]["transformer"]
    assert made["streamed"] >= 10
    assert result["peak_rss_bytes"] <= made["predicted_bytes"]


def test_scripts_get_the_error_itself(tiny: Path) -> None:
    pipeline = Pipeline(open_model(tiny), RuntimeOptions("cpu", ram_bytes=10**6))
    with pytest.raises(BudgetError, match="the smallest that works is --ram"):
        pipeline.generate([GenerateOptions("cat", 64, 64)])
