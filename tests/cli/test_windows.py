"""What shells, consoles and file systems of Windows do otherwise, played on any system."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path, PureWindowsPath
from typing import Any

import pytest
from PIL import Image

from zimage_lite import cli
from zimage_lite.checkpoint import output
from zimage_lite.checkpoint.output import require_absent, unknown_to_windows
from zimage_lite.cli import files_meant, previews, run
from zimage_lite.cli.requests import requests_of
from zimage_lite.cli.streams import _Outlet
from zimage_lite.errors import UserError

ENDS = """
import os, signal, sys
signal.SIGBREAK = signal.SIGUSR1  # Ctrl-Break, and what a program sends to one that it started
from zimage_lite import cli
cli.cli.main = lambda *args, **options: os.kill(os.getpid(), signal.SIGBREAK)
cli.main([])
"""


def test_arguments_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """click would fill in variables, home folders and wildcards on Windows, and prompts hold all of that."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(cli.cli, "main", lambda args, **options: given.update(options))
    assert run([]) == 0
    assert given["windows_expand_args"] is False


def test_torch_without_a_library_of_windows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As torch raises it where Visual C++'s are missing."""

    def missing(*_: object, **options: object) -> None:
        error = OSError(22, 'The module could not be found. Error loading "c10.dll" or one of its dependencies.')
        error.winerror = 126  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(cli.cli, "main", missing)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert run([]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: torch cannot be loaded (The module") and "run zimage-lite doctor" in said


def test_wildcards_are_filled_in_where_files_are_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("6gb.json", "12gb.json", "[a].json"):
        (tmp_path / name).touch()
    patterns = [str(tmp_path / "*gb.json"), str(tmp_path / "[a].json"), "none*.json"]
    assert files_meant(patterns) == patterns
    monkeypatch.setattr(sys, "platform", "win32")
    found = [str(tmp_path / name) for name in ("12gb.json", "6gb.json", "[a].json")]
    assert files_meant(patterns) == [*found, "none*.json"]


@pytest.mark.skipif(not hasattr(os, "eventfd"), reason="nothing else says EINVAL")
@pytest.mark.parametrize(("system", "lost"), [("win32", None), ("linux", errno.EINVAL)])
def test_a_reader_that_left(system: str, lost: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    outlet = _Outlet(os.eventfd(0), "w")
    assert outlet.write(b"x") == 1
    assert (outlet.lost.errno if outlet.lost else None) == lost
    outlet.close()


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="stands for SIGBREAK")
def test_ctrl_break_ends_as_an_interrupt() -> None:
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True)
    assert done.returncode == 130 and done.stderr.startswith(b"interrupted")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (r"C:\pictures\fox.png", None),
        (r"\\server\share\..\a fox & (two).png", None),
        ("console.png", None),
        (r"C:\pictures\a fox: red.png", "a fox: red.png"),
        ("fox?.png", "fox?.png"),
        (r"out\NUL.png", "NUL.png"),
        ("com1", "com1"),
    ],
)
def test_names_that_mean_something_else(path: str, name: str | None) -> None:
    assert unknown_to_windows(PureWindowsPath(path)) == name


def test_such_a_name_is_refused_before_anything_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_absent(tmp_path / "a: b.png", overwrite=False)
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(UserError, match=r"Windows has no such names: got a: b\.png; choose another name with -o"):
        require_absent(tmp_path / "a: b.png", overwrite=False)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            r'{"prompt": "x", "image": "C:\pictures\a.png"}',
            "line 1: not JSON: .*; in JSON a backslash",
        ),
        (r'{"prompt": "x", "image": "C:\fox.png"}', r"line 1: image: got 'C:\\x0cox.png', .*; in JSON a backslash is"),
        (r'{"prompt": "x", "loras": ["C:\new.safetensors:0.5"]}', "line 1: loras: .* in JSON a backslash is written"),
    ],
)
def test_paths_with_backslashes_in_json(line: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(UserError, match=told):
        requests_of((), tmp_path / "lines.jsonl", {}, 1)


def test_a_folder_that_takes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`os.access` says of every folder there that it does."""

    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sys, "platform", "win32")
    require_absent(tmp_path / "x.png", overwrite=False)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(Path, "touch", refused)
    with pytest.raises(UserError, match="cannot be written to; choose another place with -o"):
        require_absent(tmp_path / "x.png", overwrite=False)


def test_a_preview_that_a_viewer_has_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The picture is drawn all the same, and waits no more for it."""
    tries = []

    def held(*_: object) -> None:
        tries.append(1)
        error = PermissionError(13, "in use")
        error.winerror = 32  # type: ignore[attr-defined]
        raise error

    picture, show = Image.new("RGB", (8, 8)), previews._shower(str(tmp_path / "x.png"))
    show(picture)
    for name in ("replace", "rename"):
        monkeypatch.setattr(output.os, name, held)
    monkeypatch.setattr(output.time, "sleep", lambda seconds: None)
    show(picture)
    tried = len(tries)
    show(picture)
    assert len(tries) == tried and capsys.readouterr().err.startswith("note: no more previews: ")
    assert [file.name for file in tmp_path.iterdir()] == ["x.png"]
