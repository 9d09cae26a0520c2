"""tools/gpu_check.sh on a machine that has next to nothing: what it plans and keeps, and that its tests collect."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.sh"
ORDER = [
    "facts", "doctor", "everyday", "block", "step", "linear_int8", "attention", "laptop_ptx", "streaming_tests",
    "streaming", "tier_6gb", "tune", "elementwise", "kernel_tests", "report",
]  # fmt: skip

# Says what it was asked for, writes a result, and ends as it is told to by the name of the script that it is given.
PRETENDED = """#!/usr/bin/env bash
echo "$ZIMAGE_LITE_CACHE ${TRITON_INTERPRET-unset}"
echo "$*"
echo '{"a": "long line that nobody reads"}'
for word; do [[ "$before" == --out ]] && echo '{"cells": []}' > "$word"; before="$word"; done
case "$*" in *FACTS*) exit 2 ;; *bench_linear*) exit 3 ;; *tiers/tier_6gb*) sleep SLEEP ;; esac
"""
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="needs bash and timeout")]


def run(folder: Path, seconds: int, sleep: int = 0, facts: str = "nothing") -> tuple[dict[str, Any], str, Path]:
    """With a pretended Python. -> parts by their names, what was printed, the folder of the results."""
    python, out = folder / "python", folder / "out"
    python.write_text(PRETENDED.replace("SLEEP", str(sleep)).replace("FACTS", facts))
    python.chmod(0o755)
    tools = folder / "bin"
    tools.mkdir()
    for name in ("bash", "cp", "dirname", "env", "grep", "gzip", "mkdir", "mktemp", "mv", "rm", "sleep", "tail", "tar",
                 "timeout"):  # fmt: skip
        found = shutil.which(name)
        assert found, name
        (tools / name).symlink_to(found)
    environment = {"PYTHON": str(python), "GPU_CHECK_SECONDS": str(seconds), "PATH": str(tools), "OUT": str(out)}
    done = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and not done.stderr, done.stderr
    parts = json.loads((out / "parts.json").read_text())["parts"]
    return {part["name"]: part for part in parts}, done.stdout, out


def test_the_plan_is_nine_minutes(tmp_path: Path) -> None:
    """In its order; no limit is below what a part is expected to take. Nothing but its own tools is on the PATH."""
    parts, printed, out = run(tmp_path, 540)
    assert list(parts) == ORDER
    assert sum(part["planned"] for part in parts.values()) == 540
    assert all(part["limit"] >= part["planned"] for part in parts.values()) and parts["facts"]["limit"] >= 90
    assert {name: part["code"] for name, part in parts.items()} == dict.fromkeys(ORDER, 0) | {"linear_int8": 3}
    assert sorted(path.name for path in out.iterdir()) == ["gpu_check.tgz", "parts.json"]
    (tests,) = (line for line in printed.splitlines() if "test_attention.py" in line)
    assert " -vv " in tests and "--collect-only" not in tests
    assert len(printed) < 12_000 and "nobody reads" not in printed
    with tarfile.open(out / "gpu_check.tgz") as archive:
        names = {Path(name).name for name in archive.getnames()}
        assert {f"{name}.log" for name in ORDER} | {"tier_6gb.json", "parts.json"} <= names
        log = archive.extractfile("gpu_check/facts.log")
        assert log is not None
        cache, interpreted = log.readline().decode().split()
    assert cache not in ("off", "") and not Path(cache).exists() and interpreted == "unset"


def test_what_there_is_when_time_is_up_is_kept(tmp_path: Path) -> None:
    """In a few seconds, of which a part that hangs takes all that is left but for the report's."""
    parts, _, out = run(tmp_path, 18, sleep=60)
    assert parts["tier_6gb"]["code"] == 124 and parts["elementwise"]["code"] is None and parts["report"]["code"] == 0
    with tarfile.open(out / "gpu_check.tgz") as archive:
        kept = archive.extractfile("gpu_check/tier_6gb.json")
        assert kept is not None and json.load(kept) == {"cells": []}


def test_kernel_tests_are_only_collected_without_a_gpu(tmp_path: Path) -> None:
    parts, printed, _ = run(tmp_path, 540, facts="gpu_facts")
    assert parts["facts"]["code"] == 2
    (tests,) = (line for line in printed.splitlines() if "test_attention.py" in line)
    assert " --collect-only " in tests


def test_its_tests_collect_on_a_bare_machine() -> None:
    """Where nobody else's packages are, and without conftest, as the script runs them."""
    named = re.findall(r"tests/\w+/test_[\w{},]+\.py", SCRIPT.read_text())
    files = [f"{start}{name}{end}" for path in named for start, names, end in [split(path)] for name in names]
    assert len(files) == 8 and all((ROOT / file).exists() for file in files)
    command = [sys.executable, ROOT / "tests" / "helpers" / "bare_machine.py", "--noconftest", "--collect-only"]
    command += ["-p", "no:xdist", *(plain := ["-o", "addopts=--import-mode=importlib"])]  # it has no pytest-xdist
    assert f"--noconftest {' '.join(plain)} " in SCRIPT.read_text()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([*command, *files], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def split(path: str) -> tuple[str, list[str], str]:
    """As the shell expands braces."""
    start, brace, rest = path.partition("{")
    names, _, end = rest.partition("}")
    return start, names.split(",") if brace else [""], end
