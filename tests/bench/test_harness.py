"""The harness: its arithmetic by hand and against torch's own counter, what it says without a GPU, what it keeps."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from zimage_lite.api import open_named
from zimage_lite.bench import case as bench_case
from zimage_lite.bench import harness as bench
from zimage_lite.bench.case import PROMPT, Case, measured
from zimage_lite.bench.ceilings import Ceilings, PhaseWork, measure
from zimage_lite.bench.harness import Request, in_process, rate, share, spread, summary
from zimage_lite.bench.tiers import DONE, FAILED, NO_FIT, NOT_RUN, OOM, SIZES, TIERS
from zimage_lite.cli import run
from zimage_lite.config import GenerateOptions, RuntimeOptions
from zimage_lite.memory.gpus import find_gpu
from zimage_lite.memory.hardware import machine_here, probe
from zimage_lite.memory.machine import CUDA_CONTEXT_BYTES, VRAM_MARGIN_BYTES, Work, machine
from zimage_lite.memory.plan import Block, Phase
from zimage_lite.pipeline.drawing import Pipeline
from zimage_lite.plan.job import Job
from zimage_lite.plan.model_sizes import true_model
from zimage_lite.plan.prediction import phases

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# --- Arithmetic


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.0, 4.0, 10.0]) == {"median": 3.0, "min": 1.0, "max": 10.0, "spread": 3.0}
    assert spread([2.0, 2.0]) == {"median": 2.0, "min": 2.0, "max": 2.0, "spread": 0.0}


def test_rate_and_share() -> None:
    assert rate(2e12, 4.0) == 0.5 and rate(1.0, 0.0) is None
    assert share(3.0, 4.0) == 0.75 and share(1.0, 0.0) is None


@pytest.mark.parametrize(
    ("int8", "int8_tops", "attention8", "seconds"),
    [
        (True, 100.0, True, 0.01 + 0.01 + 0.02),  # linears and queries x keys at 100, scores x values at 50
        (True, 100.0, False, 0.01 + 0.02 + 0.02),
        (False, 100.0, True, 0.02 + 0.02 + 0.02),
        (True, None, False, 0.02 + 0.02 + 0.02),
    ],
)
def test_least_time(int8: bool, int8_tops: float | None, attention8: bool, seconds: float) -> None:
    """1e12 operations in linears and 2e12 in attention; ceilings of 50 and 100 tera-operations per second."""
    found = Ceilings("bf16", 50.0, int8_tops, attention8).seconds(Work(1e12, 2e12, int8=int8))
    assert found == pytest.approx(seconds)


def test_work_of_a_phase() -> None:
    """Three passes of 5 and 7 operations, after two of 11."""
    blocks = tuple(Block(str(n), 1, Work(float(n))) for n in (5, 7))
    phase = Phase("denoise", blocks, passes=3, prelude=(Block("first", 1, Work(11.0)),), prelude_passes=2)
    work = PhaseWork.of(phase, Ceilings("bf16", 1e-12))
    assert (work.flops, work.pass_flops) == (3 * 12 + 2 * 11, 12)
    assert (work.limit_seconds, work.pass_limit_seconds) == pytest.approx((58, 12))


def test_operations_of_the_true_model() -> None:
    """One step at 1024x1024 with a prompt of 20 tokens, padded to 32, counted by hand: 30 blocks over 4128 tokens and 2
    over the image's 4096; of weights q, k, v and out with 3840 x 3840 each, and w1, w2, w3 with 3840 x 10240."""
    job = Job(1024, 1024, prompt_tokens=(20,))
    denoise = phases(true_model("int8"), job, machine(find_gpu("RTX 4090"), 10**11))[1][0]
    weights = 4 * 3840**2 + 3 * 3840 * 10240
    linear = 2 * weights * (30 * 4128 + 2 * 4096)
    attention = 4 * 3840 * (30 * 4128**2 + 2 * 4096**2)
    assert PhaseWork.of(denoise, Ceilings("bf16", 1.0)).pass_flops == linear + attention


def test_operations_against_torchs_counter() -> None:
    """The whole image. Ours leave out embedders, adaLN and the last layer, which together are under 3 % even of a model
    as small as the demo; the counter knows convolutions and products, and is told what attention on a CPU is."""

    def attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    pipeline = Pipeline(open_named("demo", {}), RuntimeOptions("cpu", cache=False))
    request = pipeline.complete(GenerateOptions(PROMPT, 128, 128, steps=4))
    machine_here(pipeline.hardware)  # what it measures, it measures once, and that is not counted
    ops = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=ops) as counter:
        pipeline.generate([request])
    work = bench_case._work(pipeline, request, Ceilings("fp32", 1.0))
    assert set(work) == {"encode", "denoise", "decode"}
    assert sum(one["flops"] for one in work.values()) == pytest.approx(counter.get_total_flops(), rel=0.03)


def raw_case(**changes: Any) -> dict[str, Any]:
    """A cold run of 10 s and warm ones of 4, 5 and 6."""
    runs = [
        {
            "seconds": seconds,
            "step_seconds": [9.0, 2.0, 2.0],
            "phases": {"denoise": {"seconds": seconds - 1, "peak_vram_bytes": 100 + i, "copied_bytes": 10 * i}},
        }
        for i, seconds in enumerate([10.0, 4.0, 5.0, 6.0])
    ]
    work = {"denoise": {"flops": 8e12, "limit_seconds": 3.0, "pass_flops": 4e12, "pass_limit_seconds": 1.5}}
    return {"outcome": DONE, "runs": runs, "plans": {"denoise": {"pass_ms": 1.0}}, "work": work, **changes}


def test_summary() -> None:
    found = summary(raw_case())
    assert found["seconds"] == {"cold": 10.0, "warm": {"median": 5.0, "min": 4.0, "max": 6.0, "spread": 0.4}}
    denoise = found["phases"]["denoise"]
    assert denoise["seconds"]["warm"]["median"] == 4.0 and denoise["seconds"]["cold"] == 9.0
    assert denoise["tflops"] == 2.0 and denoise["share_of_limit"] == 0.75  # 8e12 in 4 s; 3 s of 4
    assert denoise["copied_bytes"] == 20  # of the middle warm one
    assert denoise["peak_vram_bytes"] == 103  # the highest of all
    assert found["step_seconds"]["median"] == 2.0  # without the first, which loads
    assert found["step_share_of_limit"] == 0.75


def test_what_failed_is_kept_as_it_is() -> None:
    raw = raw_case(outcome=OOM, reason="no more")
    assert summary(raw) == raw


def test_ceiling_is_a_rate_of_this_device() -> None:
    """More than one core does with scalars, less than any CPU has."""
    found = measure(probe("cpu"))
    assert found.dtype == "fp32" and found.int8_tops is None and 0.001 < found.tflops < 100


# --- Measured cases


def test_case_of_the_demo() -> None:
    found = measured(Case("demo", None, repeats=2, steps=3, device="cpu"))
    assert found["outcome"] == DONE and found["size"] == [64, 64] and found["told"] == []
    assert len(found["runs"]) == 3 and all(len(one["step_seconds"]) == 3 for one in found["runs"])
    cell = summary(found)
    assert set(cell["phases"]) == {"encode", "denoise", "decode"}
    inside = sum(phase["seconds"]["warm"]["min"] for phase in cell["phases"].values())
    assert inside <= cell["seconds"]["warm"]["max"]
    assert cell["step_share_of_limit"] > 0 and cell["phases"]["denoise"]["read_bytes"] > 10**7
    assert json.loads(json.dumps(cell)) == cell


def test_what_does_not_fit_is_a_result() -> None:
    found = measured(Case("demo", None, repeats=1, steps=1, ram_bytes=10**6, device="cpu"))
    assert found["outcome"] == NO_FIT and "the smallest that works" in found["reason"] and found["runs"] == []


def test_running_out_of_memory_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more lines")

    monkeypatch.setattr(bench_case, "_draw", no_more)
    found = measured(Case("demo", None, repeats=1, steps=1, device="cpu"))
    assert (found["outcome"], found["reason"]) == (OOM, "CUDA out of memory. Tried to allocate 2 GiB")


def test_a_case_that_breaks_is_a_result() -> None:
    found = in_process({"model": "/no/such/model", "size": None, "repeats": 1, "steps": 1})
    assert found["outcome"] == FAILED and "/no/such/model" in found["reason"]
    assert in_process({}, limit=0.01) == {"outcome": FAILED, "reason": "took longer than 0.01 s"}


@pytest.mark.parametrize("context", [400_000_000, 700_000_000])
def test_cap_holds_the_whole_process(monkeypatch: pytest.MonkeyPatch, context: int) -> None:
    """The allocator gets what the tier leaves beside the context: beside the assumed one if the real one is smaller,
    since the plan counts with that."""
    caps, total, tier = [], 140 * 2**30, TIERS["6gb"]
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=total))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part, _: caps.append(part * total))
    case = Case("demo", None, 1, 1, vram_bytes=tier.vram_bytes)
    nvml: Any = SimpleNamespace(works=True, used=lambda: 10**9 + context)
    assert bench_case._take_context(case, nvml, before=10**9) == context
    assert caps == [pytest.approx(tier.vram_bytes - max(context, CUDA_CONTEXT_BYTES))]


# --- Tiers


def test_tiers_are_what_their_names_say() -> None:
    for name, tier in TIERS.items():
        assert name == f"{tier.gpu.vram_gib}gb" == tier.name and tier.vram_bytes < tier.gpu.vram_bytes
        assert {gpu.vram_gib for gpu in tier.gpus} == {tier.gpu.vram_gib} and len(set(tier.gpus)) == len(tier.gpus)
        for format_name in tier.formats:
            true_model(format_name)


@pytest.mark.parametrize("name", TIERS)
def test_script_of_a_tier_predicts(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it, as people run it: on a machine without a GPU it says in its first line that it predicts."""
    monkeypatch.setattr("zimage_lite.cli.main", run)  # which would leave this process
    monkeypatch.setattr(sys, "argv", ["tier", "--json"])
    runpy.run_path(str(ROOT / "benchmarks" / "tiers" / f"tier_{name}.py"), run_name="__main__")
    printed = capsys.readouterr()
    assert printed.err.splitlines()[0] == "A prediction, nothing was run: there is no CUDA GPU here"
    result, tier = json.loads(printed.out.splitlines()[-1]), TIERS[name]
    assert result["prediction"] is True and result["tier"]["name"] == name
    assert all(cell["prediction"] for cell in result["cells"])
    rows = [cell for cell in result["cells"] if cell["gpu"] == tier.gpu.name]
    assert [(cell["format"], *cell["size"]) for cell in rows] == [(f, s, s) for f in tier.formats for s in SIZES]
    for cell in rows:
        if cell["outcome"] == DONE:
            fast, slow = cell["seconds"]["range"]
            assert 0 < fast <= slow
            assert cell["peak_vram_bytes"] <= tier.vram_bytes - VRAM_MARGIN_BYTES
            assert cell["peak_ram_bytes"] <= tier.ram_bytes
    assert {cell["outcome"] for cell in rows} <= {DONE, NO_FIT} and any(cell["outcome"] == DONE for cell in rows)


def test_prediction_is_that_of_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--tier", "6gb", "--formats", "int4", "--sizes", "1024", "--json"]) == 0
    cell = json.loads(capsys.readouterr().out.splitlines()[-1])["cells"][0]
    assert run(["plan", "--format", "int4", "--gpu", cell["gpu"], "--ram", "8GB", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    for power in (0, 1):
        seconds = sum(phase["total_ms"][power] for phase in plan["phases"]) / 1000
        assert cell["seconds"]["range"][power] == pytest.approx(seconds, abs=0.01)


def test_more_memory_is_never_slower() -> None:
    result = predicted("8gb")
    for one in result["sweeps"]:
        budgets, times = zip(*((point["vram_bytes"], point["range"]) for point in one["points"]), strict=True)
        assert list(budgets) == sorted(budgets) and len(budgets) > 2
        assert list(times) == sorted(times, reverse=True)


def predicted(name: str) -> dict[str, Any]:
    request = Request.of(TIERS[name], None, [], [], 5)
    return bench.bench(request, lambda line: None, lambda result: None)


def test_measured_tier_keeps_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card that is large enough, here a pretended one: cases go to their processes with the tier's limits, the
    table holds those still to come from the start, and what ran out of memory stays."""
    asked, saved = [], []

    def pretended(case: dict[str, Any]) -> dict[str, Any]:
        asked.append(case)
        facts = {"process_peak_bytes": 5 * 10**9, "peak_rss_bytes": 10**9, "told": []}
        return raw_case(**facts) if case["model"] == "synthetic:int8" else {"outcome": OOM, "reason": "no more"}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(total_memory=140 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr("zimage_lite.bench.machine.asked", lambda: {"gpu": "pretended"})
    monkeypatch.setattr(bench, "in_process", pretended)
    tier, said = TIERS["6gb"], []
    request = Request.of(tier, None, ["int8", "bf16"], [1024], 5)
    result = bench.bench(request, said.append, lambda one: saved.append(json.dumps(one)))
    assert result["prediction"] is False and "prediction" not in said[0]
    rows = [cell for cell in result["cells"] if not cell["prediction"]]
    assert [(cell["format"], cell["outcome"]) for cell in rows] == [("int8", DONE), ("bf16", OOM)]
    assert rows[0]["seconds"]["warm"]["median"] == 5.0 and rows[1]["reason"] == "no more"
    assert any(cell["prediction"] for cell in result["cells"])  # the card that the tier stands for, beside it
    assert {case["vram_bytes"] for case in asked} == {tier.vram_bytes} and asked[0]["repeats"] == 5
    outcomes = [[cell["outcome"] for cell in json.loads(one)["cells"] if not cell["prediction"]] for one in saved]
    assert outcomes == [[], [DONE, NOT_RUN], [DONE, OOM]]


def test_card_that_is_too_small_predicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 6 GB card of which the driver shows a little less holds the 6 GB tier, and not the next."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(total_memory=int(5.8 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert bench.missing(TIERS["6gb"].vram_bytes) is None
    assert "5.8 GiB, and the tier is 7.7 GiB" in str(bench.missing(TIERS["8gb"].vram_bytes))


def test_what_is_measured_without_a_tier() -> None:
    assert Request.of(None, None, [], [], 5) == Request(None, {"demo": "demo"}, (None,))
    assert Request.of(None, None, ["int8"], [512], 5) == Request(None, {"int8": "synthetic:int8"}, (512,))
    named = Request.of(TIERS["6gb"], "folder", [], [], 7)
    assert named == replace(named, models={"folder": "folder"}, sizes=SIZES, repeats=7)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--tier", "5gb"], "error: --tier: got 5gb, expected one of 4gb, 6gb, 8gb, 12gb, 16gb, 24gb"),
        (["--repeats", "1"], "error: --repeats: got 1, expected at least 2"),
        (["--sizes", "512,100"], "error: --sizes: got '100', expected multiples of 16, such as 512,1024"),
        (["--tier", "4gb", "--model", "demo", "--formats", "int8"], "error: --formats is for random weights"),
        (["--model", "/no/such/model"], "error: /no/such/model: "),
        (["--tier", "4gb", "--formats", "int9"], "error: --formats: not a format that can be written: got 'int9'"),
        (["--tier", "4gb", "--out", "/no/such/folder/x.json"], "error: /no/such/folder: no such folder"),
    ],
)
def test_refusals(arguments: list[str], line: str, refused: Callable[..., str]) -> None:
    assert refused("bench", *arguments).startswith(line)
