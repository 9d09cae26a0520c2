"""The verb plan: what it prints, and that it says what generate plans."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from make_checkpoint import component_shapes
from plans import GB, GIB, LAPTOP, named
from safetensors.torch import save_file
from stubs import write

from zimage_lite import load
from zimage_lite.cli import run
from zimage_lite.config import ControlConfig
from zimage_lite.memory.machine import Machine, machine
from zimage_lite.plan.job import LONG_PROMPT_TOKENS, Job
from zimage_lite.plan.model_sizes import true_model
from zimage_lite.plan.prediction import phases


def test_the_verb(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "step.svg"
    arguments = ["plan", "--gpu", "3060 laptop", "--format", "int4", "--vram", "3GB", "--plot", str(picture), "--json"]
    assert run(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("A prediction, nothing was run: Z-Image-Turbo in int4, 1024x1024, 8 steps")
    result = json.loads(captured.out)
    assert result["gpu"] == "RTX 3060 Laptop 6GB" and result["vram_bytes"] == 3 * GB
    assert [phase["phase"] for phase in result["phases"]] == ["encode", "denoise", "decode"]
    assert all(phase["peak_vram_bytes"] <= 3 * GB for phase in result["phases"])
    assert result["phases"][1]["way"] == 1 and not result["phases"][2]["way"]["spilled"]
    fast, slow = result["phases"][1]["pass_ms"]
    assert fast < slow
    assert picture.read_text(encoding="utf-8").startswith("<svg")


def test_the_verb_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--vram", "1.8GB", "--width", "512", "--height", "512", "--count", "8"]
    assert run(["plan", "--gpu", "4050 laptop", *sizes, "--json"]) == 0
    captured = capsys.readouterr()
    assert "8 images of 512x512" in captured.err
    assert re.search(r"denoise .*compute +\d images at once\n", captured.err)
    assert re.search(r"decode .*compute +whole image\n", captured.err)
    result = json.loads(captured.out)
    assert result["count"] == 8 and result["phases"][2]["passes"] == 8
    assert result["phases"][1]["way"] > 1 and result["phases"][2]["way"]["rows_per_band"] == 0


def test_a_lora_takes_what_its_numbers_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of strength 0: nothing, as in `generate`."""
    a, b = torch.ones(512, 3840, dtype=torch.bfloat16), torch.ones(3840, 512, dtype=torch.bfloat16)
    to_q = "diffusion_model.layers.7.attention.to_q"
    save_file({f"{to_q}.lora_A.weight": a, f"{to_q}.lora_B.weight": b}, tmp_path / "style.safetensors")

    def planned(*more: str) -> dict[str, Any]:
        assert run(["plan", "--gpu", "3060 laptop", "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)

    lora = str(tmp_path / "style.safetensors")
    without, beside, at_zero = planned(), planned("--lora", lora), planned("--lora", f"{lora}:0")
    assert at_zero == without
    assert beside["phases"][1]["peak_vram_bytes"] > without["phases"][1]["peak_vram_bytes"]


def test_a_step_is_one_of_several_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    control = ["--control", "synthetic:2.1-lite/int8", "--control-end", "0.5"]
    assert run(["plan", "--gpu", "3060 laptop", *control]) == 0
    assert "\na step on average: " in capsys.readouterr().out


def test_a_control_takes_what_its_blocks_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1.0 as it was released, in a file of zeros: 8 blocks in 16 bits more, each in its place."""
    shapes = component_shapes(ControlConfig(16, (0, 5, 10, 15, 20, 25), add_control_noise_refiner=None))
    net = write(tmp_path / "union.safetensors", shapes)

    def planned(*more: str) -> dict[str, Any]:
        assert run(["plan", "--gpu", "3060 laptop", "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)

    without, beside = planned(), planned("--control", str(net))
    assert [phase["phase"] for phase in beside["phases"]] == ["picture", "encode", "denoise", "decode"]
    plain, more = (next(p for p in one["phases"] if p["phase"] == "denoise") for one in (without, beside))
    order = list(more["homes"])
    assert len(order) == len(plain["homes"]) + 8
    assert order[1:6] == ["noise_refiner.1", *(f"controls.0.control_noise_refiner.{i}" for i in (0, 1)),
                          "controls.0.control_layers.0", "layers.0"]  # fmt: skip
    assert order.index("controls.0.control_layers.1") + 1 == order.index("layers.5")
    assert more["fixed"]["control states"] == 2 * (4096 + 128) * 3840 * 2
    step = more["pass_ms"][0] - plain["pass_ms"][0]
    assert step / plain["pass_ms"][0] > 8 / 32
    (own,) = beside["controls"]
    homes = [home for block, home in more["homes"].items() if block.startswith("controls.")]
    assert own["name"] == "union" and own["blocks"] == {home: homes.count(home) for home in own["blocks"]}
    assert 3.0e9 < own["bytes"] < 3.11e9  # 1550.8 million weights, but for embedders and what the time weighs
    half = next(p for p in planned("--control", str(net), "--control-end", "0.5")["phases"] if p["phase"] == "denoise")
    assert half["fixed"] == more["fixed"]
    assert more["total_ms"][0] - half["total_ms"][0] == pytest.approx(4 * step, rel=0.1)  # of 8 steps


def test_each_control_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    """Nearly all that a step takes longer, where computing bounds it."""
    nets = ["synthetic:2.1-lite/int8", "synthetic:2.1/int8"]
    command = ["plan", "--gpu", "RTX 4090", "--control-end", "0.5"]
    assert run([*command, *(word for net in nets for word in ("--control", net))]) == 0
    out = capsys.readouterr().out
    for net, count in zip(nets, (5, 17), strict=True):
        assert f"{net}: {count} of these blocks, " in out
    assert out.count("ms of a step, asked in 4 of 8 passes") == 2 and ", at most 0.0 MB over the link" in out
    totals, own = [], []
    for more in ([], ["--control", nets[0]]):
        assert run(["plan", "--gpu", "RTX 4090", "--json", *more]) == 0
        said = json.loads(capsys.readouterr().out)
        totals.append(next(phase for phase in said["phases"] if phase["phase"] == "denoise")["pass_ms"])
        own += [net["compute_ms"] for net in said["controls"]]
    assert own[0] == pytest.approx([more - plain for plain, more in zip(*totals, strict=True)], rel=0.05)


def test_the_verb_refuses(refused, tiny: Path) -> None:
    assert "RTX 4070 Ti" in refused("plan", "--gpu", "4070")
    line = refused("plan", "--gpu", "RTX 3060 Laptop", "--vram", "1GB", code=3)
    assert named(line)[0]["vram"] <= 2 * GIB
    refused("plan", "--gpu", "RTX 3060 Laptop", "--format", "int5")
    refused("plan", "--gpu", "RTX 3060 Laptop", "--plot", "step.png")
    refused("plan", "--gpu", "RTX 3060 Laptop", "--count", "0")
    refused("plan", "--gpu", "RTX 3060 Laptop", "--model", tiny, "--format", "int8")


def test_a_model_folder_has_its_own_sizes(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--vram", "2GB", "--model", str(tiny), "--width", "64", "--height", "64", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == "tiny (bf16)" and result["vram_bytes"] == 2 * GB
    assert list(result["phases"][1]["homes"]) == [f"noise_refiner.{i}" for i in (0, 1)] + [
        f"layers.{i}" for i in range(3)
    ]


@pytest.mark.slow
def test_the_verb_says_what_generate_plans(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the same machine and budgets, for a prompt as long as the verb assumes. Here the CPU stands in for the GPU:
    it does what was planned."""
    there = replace(machine(LAPTOP, 16 * GB), name="here", vram_free_bytes=4 * GB, process_bytes=GB // 2)
    monkeypatch.setattr("zimage_lite.cli.plan._here", lambda: (LAPTOP, there))
    monkeypatch.setattr("zimage_lite.plan.retry.machine_here", lambda *_: there)
    asked = ["--width", "96", "--height", "64", "--steps", "2", "--count", "3", "--ram", "3GB", "--json"]
    model = load(tiny, device="cpu").model
    prompt = next(text for n in range(999) if len(model.tokenizer.encode(text := "9" * n)) == LONG_PROMPT_TOKENS)
    vram_bytes, resident = 3 * GB, list[int]()
    for _ in range(2):
        limits = [*asked, "--model", str(tiny), "--vram", f"{vram_bytes}b"]
        assert run(["plan", *limits]) == 0
        said = {phase["phase"]: phase for phase in json.loads(capsys.readouterr().out)["phases"]}
        assert run(["generate", prompt, *limits, "--device", "cpu", "-o", str(tmp_path / "x.png")]) == 0
        done = json.loads(capsys.readouterr().out)["phases"]
        assert list(said) == list(done) and said["denoise"]["device"] == "gpu"
        for name, phase in done.items():
            assert {"peak_vram_bytes", "peak_ram_bytes", "blocks", "way", "fixed"} < set(phase["planned"])
            for fact, value in phase["planned"].items():
                expected = said[name][fact]
                expected = round(expected[0], 1) if fact.endswith("_ms") else expected  # at the highest power limit
                assert value == expected, (name, fact)
        resident.append(said["denoise"]["blocks"]["device"])
        vram_bytes = said["denoise"]["peak_vram_bytes"] - 1  # the second time too little for all blocks
    assert resident[0] == 5 and resident[1] < 5


def test_a_cpu_that_multiplies_in_8_bits() -> None:
    """int8 as it is, other integers as the int8 that they become while they are read, which takes time and memory;
    what is not made of integers is unpacked as on any CPU."""
    plain = Machine("a CPU", 16 * GB)
    fast = replace(plain, cpu=replace(plain.cpu, linear8=2 * plain.cpu.linear16), cpu_int8=True, loops_bytes=10**8)
    job, block_weights = Job(512, 512, prompt_tokens=(128,)), 4 * 3840**2 + 3 * 3840 * 10240
    for name, in_int8, loops in (
        ("int8", True, None),
        ("int4", True, 0),
        ("q4_k_m", True, 10**8),
        ("fp8", False, None),
    ):
        (before,), (after,) = (phases(true_model(name), job, there)[1] for there in (plain, fast))
        layers = [[b for b in phase.blocks if b.name.startswith("layers.")] for phase in (before, after)]
        works = [[block.work for block in of] for of in layers]  # q4_k_m keeps the noise refiner in 16 bits
        assert not any(work.int8 for work in works[0]) and all(work.int8 == in_int8 for work in works[1])
        assert all(block_weights <= block.n_bytes < 1.002 * block_weights for block in layers[1])
        assert dict(after.fixed).get("compiled loops") == loops
        assert ("re-encoding" in dict(after.fixed)) == (loops is not None) == all(b.making_flops for b in layers[1])
        assert not any(block.making_flops for block in layers[0])
        others = [phase_works[0].other_flops for phase_works in works]
        assert (others[1] < others[0]) == in_int8
        times = [sum(map(there.cpu.milliseconds, of)) for there, of in zip((plain, fast), works, strict=True)]
        assert (times[1] < times[0]) == in_int8


def test_planning_loads_no_torch() -> None:
    code = "import sys, zimage_lite.memory.planner; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
