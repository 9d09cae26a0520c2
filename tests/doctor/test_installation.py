"""zimage-lite doctor: one screen, one JSON object, with and without torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from laptops import CPU_TORCH, LAPTOP, WINDOWS

from zimage_lite.cli import run
from zimage_lite.doctor import installation
from zimage_lite.doctor.installation import Installation
from zimage_lite.doctor.selftest.checks import CHECKS

Report = Callable[..., tuple[list[str], dict[str, Any]]]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Report:
    """The lines and the JSON of the command on a machine."""

    def call(found: Installation, code: int = 0) -> tuple[list[str], dict[str, Any]]:
        monkeypatch.setattr(installation, "probe", lambda: replace(found, verdicts={}))
        monkeypatch.setattr(installation, "kernel_verdicts", lambda: found.verdicts)
        assert run(["doctor", "--json"]) == code
        captured = capsys.readouterr()
        (line,) = captured.out.splitlines()
        return captured.err.splitlines(), json.loads(line)

    return call


def test_one_screen(report: Report) -> None:
    lines, told = report(LAPTOP)
    assert len(lines) <= 24
    text = "\n".join(lines)
    for fact in (
        "3.12.4",
        "2.13.0+cu130",
        "581.57, runs CUDA 13.0",
        "capability 8.6, 5.0 GiB of 6.0 GiB free",
        "3.7.1",
    ):
        assert fact in text
    assert lines[-1] == "no problems found"
    assert sum(bool(re.search(r"\b(\w+) +ok$", line)) for line in lines) == len(CHECKS)
    assert told["verdicts"] == {op: {"state": "ok", "reason": ""} for op in CHECKS}
    assert told["driver"]["cards"][0]["capability"] == [8, 6]
    assert told["can_run"] and told["problems"] == []
    assert told["backend"].startswith("triton")


def test_one_line_for_each_problem(report: Report) -> None:
    lines, told = report(replace(WINDOWS, torch=CPU_TORCH, verdicts={}))
    assert [line for line in lines if line.startswith("problem: ")] == [
        f"problem: {problem['what']}: {problem['fix']}" for problem in told["problems"]
    ]
    assert len(told["problems"]) == 1
    assert any("8.00 GB can be pinned" in line for line in lines)
    assert told["pinned_limit_bytes"] == 8_000_000_000


def test_nothing_can_run(report: Report) -> None:
    _, told = report(replace(LAPTOP, torch=None, verdicts={}), code=2)
    assert told["can_run"] is False and told["torch"] is None


@pytest.mark.slow
@pytest.mark.parametrize("hidden", ["torch", "triton"])
def test_on_this_machine(hidden: str, tmp_path: Path) -> None:
    """Without torch it says so instead of failing to import it; without Triton nothing changes on a CPU."""
    code = f"""
import importlib.util, sys
sys.modules[{hidden!r}] = None
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == {hidden!r} else find(name)
from zimage_lite.cli import run
sys.exit(run(["doctor", "--json"]))
"""
    environment = {
        **os.environ,
        "ZIMAGE_LITE_CACHE": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == (2 if hidden == "torch" else 0), done.stderr
    told = json.loads(done.stdout)
    assert (told["torch"] is None) == (hidden == "torch")
    assert told["cache"] == str(tmp_path) and told["cache_bytes"] == 0
    assert told["ram_bytes"] > told["ram_free_bytes"] > 0


def test_size_of_the_cache(tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "a").write_bytes(b"x" * 1000)
    (tmp_path / "b").write_bytes(b"x" * 234)
    assert installation._size(tmp_path) == 1234
    assert installation._size(tmp_path / "absent") == 0
