"""Results as benchmarks leave them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from zimage_lite.bench.harness import Request, bench, summary
from zimage_lite.bench.tiers import OOM, TIERS


@pytest.fixture
def tier(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A prediction, and beside it measurements as bench writes them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    request = Request.of(TIERS["4gb"], None, ["int8", "bf16"], [1024], 5)
    result = bench(request, lambda line: None, lambda one: None)
    result["prediction"] = False
    result["machine"]["gpu"] = "H200"
    facts = {"prediction": False, "model": "synthetic:int8", "format": "int8", "size": [1024, 1024]}
    planned = result["cells"][0]["phases"]["denoise"]["planned"]
    plans = {"denoise": {**planned, "total_ms": 5000.0, "pass_ms": 500.0, "peak_ram_bytes": 10**9}}
    phase = {"seconds": 4.0, "peak_rss_bytes": 10**9, "copied_bytes": 10**9, "read_bytes": 0, "wait_seconds": 0.1}
    phase |= {"peak_vram_bytes": 2**31, "peak_reserved_bytes": 2**31}
    runs = [{"seconds": s, "step_seconds": [1.0, 0.5], "phases": {"denoise": phase}} for s in (9.0, 5.0, 6.0)]
    work = {"denoise": {"flops": 4e12, "limit_seconds": 2.0, "pass_flops": 1e12, "pass_limit_seconds": 0.3}}
    peaks = {"process_peak_bytes": 3 * 10**9, "peak_rss_bytes": 10**9}
    ceilings = {"dtype": "bf16", "tflops": 700.0, "int8_tops": 1400.0, "attention8": True}
    raw = {"outcome": "done", "runs": runs, "plans": plans, "work": work, "told": [], "ceilings": ceilings, **peaks}
    gone = {**facts, "format": "bf16", "outcome": OOM, "reason": "2 GB more than there is"}
    result["cells"] += [{**facts, **summary(raw)}, gone]
    return dict(json.loads(json.dumps(result)))
