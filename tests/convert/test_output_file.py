"""A conversion that fails, is interrupted or has no room: nothing is left, and nothing that was there is touched."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conversions import (
    files_below,
    single,
    written,
)

from zimage_lite.checkpoint import output, writer
from zimage_lite.cli import run
from zimage_lite.convert import job
from zimage_lite.errors import UserError


# Each of these breaks a conversion of a folder and of a file, with and without something to replace.
@pytest.fixture(params=["folder", "file", "folder, replaced", "file, replaced"])
def command(request: pytest.FixtureRequest, model: Path, outputs: dict[str, Path], tmp_path: Path) -> list[str]:
    kind, _, replaced = request.param.partition(", ")
    source, out = (model, tmp_path / "out") if kind == "folder" else (single(model), tmp_path / "out.gguf")
    if replaced:
        old = outputs["q4_0"] if kind == "folder" else written(outputs, "q4_0")
        (shutil.copytree if kind == "folder" else shutil.copyfile)(old, out)
    return ["quantize", str(source), "--to", "q8_0", "-o", str(out), "--overwrite"]


@pytest.fixture
def untouched(tmp_path: Path, command: list[str]) -> Callable[[], bool]:
    before = files_below(tmp_path)
    return lambda: files_below(tmp_path) == before and not list(tmp_path.rglob("*.partial"))


@pytest.mark.slow
def test_no_space(command, untouched, refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("opened a file for writing")

    usage = shutil.disk_usage("/")._replace(free=100_000)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(writer.TensorWriter, "__init__", never)
    line = refused(*command)
    assert "not enough room" in line and "0.1 MB free" in line
    assert untouched()


@pytest.mark.slow
@pytest.mark.parametrize(("code", "words"), [(errno.ENOSPC, "the disk is full"), (errno.EIO, "cannot be written")])
def test_failing_disk(command, untouched, refused, monkeypatch: pytest.MonkeyPatch, code: int, words: str) -> None:
    fail_after(monkeypatch, 9, OSError(code, os.strerror(code)))
    line = refused(*command)
    assert words in line and Path(command[5]).name in line
    assert untouched()


def fail_after(monkeypatch: pytest.MonkeyPatch, calls: int, error: BaseException) -> None:
    """Let so many pieces be written, then raise."""
    put, done = writer.TensorWriter._put, []

    def failing(self: writer.TensorWriter, offset: int, data: Any) -> None:
        done.append(offset)
        if len(done) > calls:
            raise error
        put(self, offset, data)

    monkeypatch.setattr(writer.TensorWriter, "_put", failing)


@pytest.mark.slow
def test_interrupt(command, untouched, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches the main thread, where progress is reported, while others are writing."""
    report, calls = job.Meter.__call__, []

    def interrupted(self: Any, n_bytes: int) -> None:
        calls.append(n_bytes)
        if len(calls) == 9:
            signal.raise_signal(signal.SIGINT)
        report(self, n_bytes)

    monkeypatch.setattr(job.Meter, "__call__", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background start with it ignored
    try:
        assert run(command) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(calls) == 9
    assert capsys.readouterr().err.strip() == "interrupted; nothing was left half-written"
    assert untouched()


@pytest.mark.slow
def test_a_bug_leaves_nothing_either(command, untouched, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_after(monkeypatch, 9, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        run(command)
    assert untouched()


def test_places_that_cannot_be_written(model: Path, tmp_path: Path, refused) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    for source in (model, single(model)):
        assert str(file) in refused("quantize", source, "--to", "q8_0", "-o", file / "below")
        assert "no such folder" in refused("quantize", source, "--to", "q8_0", "-o", tmp_path / "none" / "out")
    assert files_below(tmp_path) == {"file": b"text"}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(model: Path, tmp_path: Path, refused) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o500)
    for source in (model, single(model)):
        assert f"{folder}: cannot be written to" in refused("quantize", source, "--to", "q8_0", "-o", folder / "out")


def test_scripts_get_the_error_itself(model: Path, tmp_path: Path) -> None:
    import zimage_lite

    with pytest.raises(UserError, match="q9_0"):
        zimage_lite.quantize(model, tmp_path / "out", "q9_0")
    (part,) = zimage_lite.quantize(single(model), tmp_path / "out.gguf", "q8_0")
    assert (part.component, part.format, part.path) == ("transformer", "q8_0", tmp_path / "out.gguf")
