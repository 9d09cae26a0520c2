"""benchmarks/everyday_gpu.py: on a GPU that is pretended, without one, and where something is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import everyday_gpu
import pytest
import torch
from pretended_cuda import pretended_cuda

from zimage_lite.doctor.selftest.verdicts import Verdict


def ended(monkeypatch: pytest.MonkeyPatch, *options: object) -> int:
    """Its exit code."""
    monkeypatch.setattr(sys, "argv", ["everyday_gpu.py", *map(str, options)])
    with pytest.raises(SystemExit) as end:
        everyday_gpu.main()
    return int(end.value.code or 0)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ended(monkeypatch) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.slow
def test_cases_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that draws, with whatever there is, and one that learns; kernels, which there are none for, fail their
    test."""
    failed = {"add_norm": Verdict("crashed", "pretended")}
    monkeypatch.setattr("zimage_lite.doctor.selftest.verdicts.verdicts", lambda device, tell: failed)
    out = tmp_path / "out.json"
    with pretended_cuda(monkeypatch):
        assert ended(monkeypatch, "--out", out, "--cases", "all at once", "statistics") == 0
    drawn, gathered = json.loads(out.read_text())["cases"]
    assert (drawn["name"], gathered["name"]) == ("all at once", "statistics")
    assert drawn["exact"]["levels"] == 0 and drawn["fast"]["dtype"] == "bf16" and 99 > drawn["fast"]["psnr_db"] > 45
    planned, taken = drawn["fast"]["planned_taken_mb"]["denoise"]
    assert 0 < taken <= planned and drawn["fast"]["within_plan"] and gathered["exact"]["within_plan"]
    assert gathered["moments_off"] == 0


def test_what_fails_is_told_and_the_others_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cases(work: object) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        yield "broken", lambda: {"right": 1 / 0 > 1}
        yield "fine", lambda: {"right": True}

    monkeypatch.setattr(everyday_gpu, "cases", cases)
    monkeypatch.setattr(everyday_gpu, "Work", lambda device, folder: None)
    out = tmp_path / "out.json"
    assert ended(monkeypatch, "--device", "cpu", "--out", out) == 1
    assert [case["right"] for case in json.loads(out.read_text())["cases"]] == [False, True]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("WRONG broken: ") and "ZeroDivisionError" in printed[0]
    assert printed[1].startswith("right fine: ")


def test_what_is_compared() -> None:
    truth = torch.full((8, 8, 3), 100, dtype=torch.uint8)
    other = truth.clone()
    other[0, 0, 0] = 103
    found = everyday_gpu.compared([other], [truth])
    assert found["levels"] == 3 and found["share_of_other_pixels"] == pytest.approx(1 / 192, abs=1e-5)
    assert found["psnr_db"] == pytest.approx(61.4, abs=0.1)
    assert everyday_gpu.compared([truth], [truth])["psnr_db"] == 99
    assert not everyday_gpu.fits({"exact": {"within_plan": True}, "fast": {"within_plan": False}, "right": True})
