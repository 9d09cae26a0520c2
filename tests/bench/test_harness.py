"""The harness: its arithmetic by hand and against torch's own counter, what it says without a GPU, what it keeps."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zimage_lite.bench import harness as bench
from zimage_lite.bench.harness import Request, rate, share, spread, summary
from zimage_lite.bench.tiers import DONE, FAILED, NOT_RUN, OOM, SIZES, TIERS


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.0, 4.0, 10.0]) == {"median": 3.0, "min": 1.0, "max": 10.0, "spread": 3.0}
    assert spread([2.0, 2.0]) == {"median": 2.0, "min": 2.0, "max": 2.0, "spread": 0.0}


def test_rate_and_share() -> None:
    assert rate(2e12, 4.0) == 0.5 and rate(1.0, 0.0) is None
    assert share(3.0, 4.0) == 0.75 and share(1.0, 0.0) is None


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


@pytest.mark.slow
def test_measured_tier_keeps_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card that is large enough, here a pretended one: cases go to their processes with the tier's limits, the
    table holds those still to come from the start, and what ran out of memory stays."""
    asked, saved = [], []

    def pretended(case: dict[str, Any], so_far: Callable[[list[Any]], None]) -> dict[str, Any]:
        asked.append(case)
        so_far([{"seconds": 7.0}])
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
    assert outcomes == [[], [FAILED, NOT_RUN], [DONE, NOT_RUN], [DONE, FAILED], [DONE, OOM]]
    (first, _) = json.loads(saved[1])["cells"][-2:]
    assert first["runs"] == [{"seconds": 7.0}] and first["reason"] == "interrupted after 1 images"
    assert "reason" not in rows[0]


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


@pytest.mark.skipif(sys.platform == "win32", reason="a shell's script")
@pytest.mark.parametrize(("code", "outcome", "reason"), [(0, DONE, None), (1, FAILED, "\ufffd is no text")])
def test_what_libraries_print_may_be_no_text(
    code: int, outcome: str, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a driver that speaks the system's code page."""
    said = json.dumps({"outcome": DONE})
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\nprintf '\\377\\n{said}\\n'\nprintf '\\377 is no text\\n' >&2\nexit {code}\n")
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))
    found = bench.in_process({})
    assert found["outcome"] == outcome and found.get("reason") == reason
