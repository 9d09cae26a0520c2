"""The process in which kernels are tested: what is told when it dies, hangs or cannot begin."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from zimage_lite.doctor.selftest import verdicts
from zimage_lite.doctor.selftest.checks import CHECKS
from zimage_lite.doctor.selftest.process import Verdict

pytest.importorskip("triton")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
OK = dict.fromkeys(CHECKS, Verdict("ok"))


def script(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Another program in the place of the process that tests; ops[0] is the first op it is asked for."""
    head = (
        "import json, os, sys, time\nops = sys.argv[1:]\ndef say(**message): print(json.dumps(message), flush=True)\n"
    )

    def command(device: torch.device, ops: Iterable[str]) -> list[str]:
        return [sys.executable, "-c", head + body, *ops]

    monkeypatch.setattr(verdicts, "command", command)


GOOD = 'for op in ops: say(op=op); {die}; say(op=op, state="ok", reason="")'


def test_a_process_that_dies_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is tested by another one. What it wrote beside is no verdict."""
    body = 'print("noise"); print("[1]"); say(op="another", state="ok", reason="")\n'
    script(monkeypatch, body + GOOD.format(die='op == "add_norm" and (sys.stderr.write("boom\\n"), os._exit(3))'))
    found = verdicts._test(DEVICE)
    assert found == {**OK, "add_norm": Verdict("crashed", "the process ended with code 3: boom")}
    assert list(found) == list(CHECKS)


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been compiling, slowly: that is no crash, and not kept. The rest is tested by another one."""
    monkeypatch.setattr(verdicts, "TIMEOUT_S", 1)
    script(monkeypatch, GOOD.format(die='op == "attention_int8" and time.sleep(60)'))
    assert verdicts._test(DEVICE) == {**OK, "attention_int8": Verdict("not tested", "no answer within 1 s")}


def test_every_kernel_may_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, "say(op=ops[0]); os.abort()")
    assert {verdict.state for verdict in verdicts._test(DEVICE).values()} == {"crashed"}


@pytest.mark.parametrize("body", ["sys.exit('No module named numba')", "", "say(op='another', state='ok', reason='')"])
def test_a_process_that_cannot_begin(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends, instead of trying for ever."""
    script(monkeypatch, body)
    found = verdicts._test(DEVICE)
    assert {verdict.state for verdict in found.values()} == {"not tested"}
    if "numba" in body:
        assert found["add_norm"].reason == "the process ended with code 1: No module named numba"


def test_no_process_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(verdicts, "command", lambda device, ops: [str(tmp_path / "absent")])
    assert verdicts._test(DEVICE)["add_norm"].state == "not tested"


@pytest.mark.slow  # every kernel in Triton's interpreter
def test_the_real_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two kernels, as a user's first image would have them tested. In a folder that has another torch in it."""
    (tmp_path / "torch.py").write_text("raise ImportError('the wrong one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
    said, running, end, timed_out = verdicts._run(verdicts.command(DEVICE, ["quantize_rows", "add_norm"]))
    assert said == {"quantize_rows": Verdict("ok"), "add_norm": Verdict("ok")}, end
    assert running == "add_norm" and not timed_out
