"""A tier where there is no such card: what is predicted is what plan says, and what README says."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from zimage_lite.bench import harness as bench
from zimage_lite.bench import predict
from zimage_lite.bench.harness import Request
from zimage_lite.bench.tiers import DONE, NO_FIT, SIZES, TIERS, Tier
from zimage_lite.cli import run
from zimage_lite.memory.machine import VRAM_MARGIN_BYTES
from zimage_lite.plan.model_sizes import true_model
from zimage_lite.report.tiers import _predicted

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FORMATS = ("int8", "int4", "q4_k_m")


@pytest.mark.parametrize("tier", TIERS.values(), ids=TIERS)
def test_the_first_table_of_the_readme(tier: Tier) -> None:
    cells = [_predicted(predict.cell(true_model(name), name, tier.gpu, 1024, tier)) for name in FORMATS]
    row = f"| {' | '.join([tier.gpu_name, f'{tier.ram_bytes // 10**9} GB', *cells])} |"
    assert row in README.splitlines(), f"say this instead: {row}"
    assert "| card | RAM | " + " | ".join(f"`{name}`" for name in FORMATS) + " |" in README


@pytest.mark.parametrize(
    "name", [name if name == "6gb" else pytest.param(name, marks=pytest.mark.slow) for name in TIERS]
)
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


@pytest.mark.slow
def test_more_memory_is_never_slower() -> None:
    result = predicted("8gb")
    for one in result["sweeps"]:
        budgets, times = zip(*((point["vram_bytes"], point["range"]) for point in one["points"]), strict=True)
        assert list(budgets) == sorted(budgets) and len(budgets) > 2
        assert list(times) == sorted(times, reverse=True)


def predicted(name: str) -> dict[str, Any]:
    request = Request.of(TIERS[name], None, [], [], 5)
    return bench.bench(request, lambda line: None, lambda result: None)
