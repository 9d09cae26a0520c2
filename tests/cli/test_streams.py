"""Nobody reads what is printed, or nobody can: the images are drawn all the same. Real processes, real pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from marking import always

from zimage_lite.cli import run

pytestmark = pytest.mark.slow  # a process for each test

PROGRAM = [sys.executable, "-m", "zimage_lite"]
FULL = Path("/dev/full")
posix = pytest.mark.skipif(sys.platform == "win32", reason="a shell's redirections")


def drawing(tiny: Path, count: int, *more: str) -> list[str]:
    size = ["--width", "64", "--height", "64", "--steps", "1", "--device", "cpu"]
    return [*PROGRAM, "generate", "x", "--model", str(tiny), *size, "--count", str(count), "-o", "x.png", *more]


def whole_images(folder: Path) -> int:
    """Nothing half-written lies about."""
    names = [path.name for path in folder.iterdir()]
    assert all(name.startswith("x-") and name.endswith(".png") for name in names), names
    return len(names)


def nowhere() -> int:
    """A pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


NOWHERE = ["2>&1 | true", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full"]


@posix
@pytest.mark.parametrize("where", always("2>&1 | true", "<&- >&- 2>&-", of=NOWHERE))
def test_output_that_goes_nowhere(tiny: Path, tmp_path: Path, where: str) -> None:
    """--json as well: stdout is gone with stderr."""
    if "/dev/full" in where and not FULL.exists():
        pytest.skip("no /dev/full")
    command = " ".join(f"'{word}'" for word in drawing(tiny, 2, "--json"))
    shell = f"set -o pipefail; {command} {where}"
    assert subprocess.run(["bash", "-c", shell], cwd=tmp_path, stdout=nowhere()).returncode == 0
    assert whole_images(tmp_path) == 2


@posix
def test_terminal_that_is_closed(tiny: Path, tmp_path: Path) -> None:
    """As under nohup: the hang-up is ignored, every line and the progress display fail."""
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.chdir(tmp_path)
        os.execv(sys.executable, drawing(tiny, 20))
    while not any(path.name.startswith("x-") for path in tmp_path.iterdir()):
        time.sleep(0.01)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert whole_images(tmp_path) == 20


@posix
def test_hang_up_ends_as_an_interrupt(tiny: Path, tmp_path: Path) -> None:
    listen = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup themselves
    process = subprocess.Popen(drawing(tiny, 1000), cwd=tmp_path, stderr=subprocess.DEVNULL, preexec_fn=listen)
    while not any(path.name.startswith("x-") for path in tmp_path.iterdir()):
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    assert process.wait() == 130
    assert 0 < whole_images(tmp_path) < 1000


@posix
@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
def test_result_that_finds_no_room_is_no_success() -> None:
    with FULL.open("w") as full:
        done = subprocess.run([*PROGRAM, "formats"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: stdout: No space left on device\n"


@posix
def test_reader_that_has_seen_enough() -> None:
    assert subprocess.run([*PROGRAM, "formats"], stdout=nowhere(), stderr=subprocess.PIPE).stderr == b""


TABLES = [["formats"], ["formats", "q4_k_m"], ["plan", "--gpu", "RTX 4060 Laptop"], ["doctor"], ["inspect"]]


@pytest.mark.parametrize("verb", TABLES, ids=" ".join)
def test_tables_are_on_stdout(verb: list[str], tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And beside the one JSON object on stderr."""
    verb = [*verb, str(tiny)] if verb == ["inspect"] else verb
    assert run(verb) == 0
    plain = capsys.readouterr()
    assert len(plain.out.splitlines()) >= 4
    assert plain.err == ""
    assert run([*verb, "--json"]) == 0
    both = capsys.readouterr()
    assert isinstance(json.loads(both.out), dict)
    assert len(both.err.splitlines()) == len(plain.out.splitlines())
