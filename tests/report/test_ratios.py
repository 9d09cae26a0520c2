"""Two results against each other."""

from __future__ import annotations

from typing import Any

import pytest
from result_pages import COMMITTED, budgets

from zimage_lite.page.html import Table
from zimage_lite.report.ratios import compared
from zimage_lite.report.sections import load, sections


def ratio(found: list[Any], what: str, quantity: str) -> Any:
    (one,) = (one for one in found if (one.what, one.quantity) == (what, quantity))
    return one


def test_ratios_of_generated_images() -> None:
    found = compared({"b": budgets()})
    quick, slow = (ratio(found, f"int8 256 px in {ram} GB, denoise", "time") for ram in (6, 8))
    assert quick.values == (2.0,) and quick.worst == 1.0 and quick.off  # 2 s were predicted, 1 s was taken
    assert slow.values == (0.5,) and slow.worst == -0.5 and slow.off
    step = ratio(found, "int8 256 px in 6 GB", "time of a step")
    assert step.values == (1.0,) and not step.off  # the second step, since the first one loads
    memory = ratio(found, "int8 256 px in 6 GB", "peak memory")
    assert memory.values == (1.04,) and not memory.off
    assert len(found) == 6  # a refusal has nothing to compare


def test_ratios_of_a_tier(tier: dict[str, Any]) -> None:
    """Only of what was measured: 5 s and 0.5 s a step were predicted, 4 s and 0.5 s taken."""
    found = compared({"t": tier})
    assert ratio(found, "int8 1024 px, denoise", "time").values == (1.25,)
    assert ratio(found, "int8 1024 px", "time of a step").values == (1.0,)
    planned = tier["cells"][-2]["plans"]["denoise"]["peak_vram_bytes"]
    assert ratio(found, "int8 1024 px", "peak memory of the GPU").middle == pytest.approx(planned / 3e9)
    assert ratio(found, "int8 1024 px", "peak memory").values == (1.0,)
    assert len(found) == 4


def test_ratios_of_other_benchmarks() -> None:
    rows = [{"device": "gpu", "home": "file", "simulated_ms": 100.0, "step_ms": ms} for ms in (100.0, 80.0, 125.0)]
    counted = [{"way": "whole", "size": "1x1", "predicted_bytes": 3, "peak_bytes": 2}]
    case = {
        "name": "int8", "size": 512, "cap_bytes": 2**32, "steady_ms": 10.0, "process_peak_bytes": 100,
        "planned_peak_bytes": 110, "plans": {"denoise": {"total_ms": 3000.0, "pass_ms": 9.0}},
        "phases": {"denoise": {"seconds": 2.0}},
    }  # fmt: skip
    found = compared({"a": {"rows": rows}, "b": {"counted": counted}, "c": {"cases": [case, {"failed": "no"}]}})
    workers = ratio(found, "workers, gpu file", "time of a step")
    assert workers.values == (1.0, 1.25, 0.8) and workers.middle == 1.0 and workers.worst == 0.25
    assert ratio(found, "VAE 1x1, whole", "peak memory").values == (1.5,)
    assert ratio(found, "int8 512 px in 4 GiB, denoise", "time").values == (1.5,)
    assert ratio(found, "int8 512 px in 4 GiB", "time of a step").values == (0.9,)
    assert ratio(found, "int8 512 px in 4 GiB", "peak memory of the GPU").values == (1.1,)


def test_errors_are_printed_with_the_prediction() -> None:
    """Of every comparison in the committed results that is off by more than 15 %, and of no other."""
    results = load(COMMITTED)
    found, page = compared(results), sections(results)
    (table,) = (
        part for part in next(s for s in page if s.title.startswith("Predicted")).parts if isinstance(part, Table)
    )
    assert len(table.rows) == len(found) > 10
    for row, one in zip(table.rows, found, strict=True):
        off = any(abs(value - 1) > 0.15 for value in one.values)
        assert row[6].startswith("off by") if off else row[6] == "within"
