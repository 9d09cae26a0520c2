"""A conversion that is killed, interrupted, or robbed of its disk or its source leaves what was there before, and the
next run tidies up. Real processes, real signals, at moments spread over a real conversion."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from make_checkpoint import SIZES, write_diffusers, write_tokenizer

from zimage_lite.checkpoint import output, writer
from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.checkpoint.model_files import open_model
from zimage_lite.checkpoint.output import clear_leftovers
from zimage_lite.cli import run
from zimage_lite.config import TextEncoderConfig, TransformerConfig
from zimage_lite.errors import UserError

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to start a hundred runs in seconds"),
    pytest.mark.slow,  # a process for each moment
]

# Loads everything once; then each line of its input is a command line that a fork of it runs like the console script.
STARTER = """
import json, os, resource, signal, sys
from zimage_lite.convert import quantize
from zimage_lite.cli import main
import torch
from zimage_lite.quant.formats import FORMATS
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background may ignore it
torch.set_num_threads(1)  # threads do not survive a fork
for name in ("q4_k", "q5_k", "q6_k"):
    FORMATS[name].codec.quantize(torch.zeros(2, 256), {}, "reference")
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(order["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        if order["file_bytes"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"],) * 2)
        code = 1
        try:
            main(order["args"])
        except SystemExit as exit:
            code = exit.code
        finally:
            os._exit(code)
    print(pid, flush=True)
    sys.stdin.readline()  # until then it is there to be killed, if only as a zombie
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


_LONGEST = 120  # seconds that a run may take: then it hangs


class Starter:
    """Runs command lines in processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "stderr"
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", STARTER], **pipes)
        self.pid = self.process.pid

    def __call__(
        self, *args: object, after: float | None = None, send: int = signal.SIGKILL, file_bytes: int = 0,
        once: Callable[[], bool] | None = None,
    ) -> int:  # fmt: skip
        """Exit code; of a run that a signal ended, minus its number. after: seconds until it is sent; once: no sooner
        than this is so."""
        order = {"args": [str(arg) for arg in args], "stderr": str(self.log), "file_bytes": file_bytes}
        assert self.process.stdin and self.process.stdout
        print(json.dumps(order), file=self.process.stdin, flush=True)
        self.last_pid = int(self.process.stdout.readline())
        while once and not once() and psutil.Process(self.last_pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.001)
        if after is not None:
            time.sleep(after)
            os.kill(self.last_pid, send)
        print(file=self.process.stdin, flush=True)
        hung = threading.Timer(_LONGEST, os.kill, (self.last_pid, signal.SIGKILL))
        hung.start()
        try:
            return int(self.process.stdout.readline())
        finally:
            hung.cancel()

    @property
    def said(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    starter = Starter(tmp_path_factory.mktemp("starter"))
    yield starter
    starter.process.communicate()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that a conversion takes some tenths of a second."""
    folder = tmp_path_factory.mktemp("source") / "model"
    folder.mkdir()
    transformer = TransformerConfig(dim=256, n_layers=3, n_refiner_layers=1, n_heads=2, cap_feat_dim=256)
    text_encoder = TextEncoderConfig(
        vocab_size=320, hidden_size=256, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        head_dim=128, intermediate_size=512,
    )  # fmt: skip
    write_diffusers(folder, (transformer, text_encoder, SIZES["tiny"][2]), torch.float32, seed=6)
    write_tokenizer(folder / "tokenizer", "tiny")
    return folder


Content = dict[str, bytes]


def files_below(path: Path) -> Content:
    found = [path] if path.is_file() else sorted(path.rglob("*"))
    return {str(file.relative_to(path)): file.read_bytes() for file in found if file.is_file()}


def command(model: Path, kind: str, out: Path, *more: object) -> tuple[object, ...]:
    part = () if kind == "folder" else ("--component", "transformer")
    return ("quantize", model, "--to", "q4_k_m", "--effort", "reference", "-o", out, *part, *more)


@pytest.fixture(scope="module", params=["file", "folder"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def measured(kind: str, start: Starter, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Content, float]:
    """What an undisturbed run makes, and the seconds that it takes: the less of two, for other programs run here."""
    folder, seconds = tmp_path_factory.mktemp("undisturbed"), []
    for _ in range(3):  # the first one warms up
        begin = time.perf_counter()
        assert start(*command(model, kind, folder / "out", "--overwrite")) == 0
        seconds.append(time.perf_counter() - begin)
    return files_below(folder / "out"), min(seconds[1:])


def complete(out: Path, kind: str) -> bool:
    """Whether all that other programs look at is there and can be opened."""
    if kind == "file":
        return len(open_checkpoint(out).tensors) > 50
    files = open_model(out)
    return all(len(part.tensors) > 10 for part in (files.transformer, files.text_encoder, files.vae))


# --- kill -9


@pytest.mark.parametrize("replaced", [pytest.param(False, marks=pytest.mark.full_size), True], ids=["new", "replaced"])
def test_killed_at_any_moment(
    start: Starter, model: Path, kind: str, measured: tuple[Content, float], replaced: bool, tmp_path: Path
) -> None:
    wanted, seconds = measured
    out = tmp_path / "out"
    old = None
    if replaced:
        assert start("quantize", model, "--to", "q8_0", "-o", out, *command(model, kind, out)[8:]) == 0
        old = files_below(out)
    line = command(model, kind, out, "--overwrite")
    rng = random.Random(13 + replaced)
    moments = sorted(rng.uniform(i / 3, (i + 1) / 3) * 1.05 for i in range(3))
    codes, cleared = [], 0

    def writing() -> bool:
        return any(name.name.startswith(f".out.{start.last_pid}.") for name in tmp_path.iterdir())

    for moment, once in [(0.0, writing), (0.05, writing), *((moment, None) for moment in moments)]:
        codes.append(start(*line, after=moment * seconds, once=once))
        left = [path.name for path in tmp_path.iterdir() if path.name != "out"]
        assert all(name.startswith(f".out.{start.last_pid}.") for name in left), left
        if out.exists():
            assert complete(out, kind)
            assert files_below(out) in (wanted, old)
        else:  # unless it was killed between the two renames, the old one is where it was
            assert old is None or any(name.endswith(".old") for name in left)
        if left:
            cleared += 1
            assert start(*line) == 0
            notes = [text for text in start.said if "an earlier run was killed before it had finished" in text]
            assert [any(name in note for note in notes) for name in left] == [True] * len(left)
            assert [path.name for path in tmp_path.iterdir()] == ["out"]
            assert files_below(out) == wanted
            if old is None:
                shutil.rmtree(out) if out.is_dir() else out.unlink()
    assert -signal.SIGKILL in codes and cleared >= 2  # else this would be no test
    assert start(*line) == 0
    assert files_below(out) == wanted


@pytest.mark.parametrize("send", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_at_any_moment(
    start: Starter, model: Path, kind: str, measured: tuple[Content, float], send: int, tmp_path: Path
) -> None:
    wanted, seconds = measured
    out = tmp_path / "out"
    codes = []
    for moment in (0.3, 0.6, 0.85):
        codes.append(start(*command(model, kind, out, "--overwrite"), after=moment * seconds, send=send))
        assert codes[-1] in (0, 130)
        if codes[-1] == 130:
            assert start.said[-1] == "interrupted; nothing was left half-written"
            assert not any("Traceback" in line for line in start.said)
        left = [path.name for path in tmp_path.iterdir()]
        assert left in ([], ["out"]) and (left or 0 not in codes)  # an interrupt may come just after the renaming
        assert not out.exists() or files_below(out) == wanted
    assert 130 in codes


# --- Leftovers


def killed_between_the_renames(out: Path, pid: int, old: Path) -> None:
    """As a run that replaces `out` looks for a moment: old and new beside the name, nothing under it."""
    shutil.copytree(old, out.with_name(f".{out.name}.{pid}.old"))
    out.with_name(f".{out.name}.{pid}.partial").mkdir()
    (out.with_name(f".{out.name}.{pid}.partial") / "model_index.json").write_text("{}")


@pytest.fixture
def dead_pid() -> int:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    return int(done.stdout)


def test_an_old_folder_that_had_stepped_aside_comes_back(tiny: Path, tmp_path: Path, dead_pid: int, refused) -> None:
    out = tmp_path / "out"
    killed_between_the_renames(out, dead_pid, tiny)
    found = clear_leftovers(out)
    assert {path.name for path in found} == {f".out.{dead_pid}.old", f".out.{dead_pid}.partial"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert files_below(out) == files_below(tiny)
    # Without --overwrite the next run must not replace it, though its name looks free.
    shutil.rmtree(out)
    killed_between_the_renames(out, dead_pid, tiny)
    line = refused("quantize", tiny, "--to", "q8_0", "-o", out, notes=2)
    assert f"{out} exists already" in line
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert files_below(out) == files_below(tiny)


def test_an_old_folder_goes_when_the_new_one_is_there(tiny: Path, tmp_path: Path, dead_pid: int) -> None:
    out = tmp_path / "out"
    shutil.copytree(tiny, out)
    old = tmp_path / f".out.{dead_pid}.old"
    old.mkdir()
    (old / "model_index.json").write_text("{}")
    assert clear_leftovers(out) == [old]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert files_below(out) == files_below(tiny)


def test_an_old_folder_is_whole_until_the_new_one_is_in_place(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    out, rename, wanted = tmp_path / "out", os.rename, files_below(tiny)
    shutil.copytree(tiny, out)

    def failing(old: Path, new: Path) -> None:
        if old.name.endswith(".partial"):
            (aside,) = tmp_path.glob(".out.*.old")
            assert files_below(aside) == wanted
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(old, new)

    monkeypatch.setattr(output.os, "rename", failing)
    with pytest.raises(UserError, match="cannot be written"), output.replacing(out) as partial:
        partial.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert files_below(out) == wanted


def test_what_is_not_left_over_stays(tiny: Path, tmp_path: Path, start: Starter, dead_pid: int, capsys) -> None:
    """Of a run that goes on, of another output, or of no run at all."""
    out = tmp_path / "o[u]t"  # a name that means something to glob
    names = [f".o[u]t.{start.pid}.partial", f".out.{dead_pid}.partial", ".o[u]t.partial", ".o[u]t.x.partial"]
    names += [f"o[u]t.{dead_pid}.partial", f".o[u]t.{dead_pid}.partial.txt", f".o[u]t-2.{dead_pid}.partial"]
    for name in names:
        (tmp_path / name).write_text(name)
    mine = tmp_path / f".o[u]t.{dead_pid}.partial"
    mine.write_text("left over")
    assert run(["quantize", str(tiny), "--to", "q8_0", "--component", "transformer", "-o", str(out)]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert len(notes) == 1 and mine.name in notes[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, out.name])
    assert all((tmp_path / name).read_text() == name for name in names)


def test_leftovers_stay_when_the_run_is_refused(tiny: Path, tmp_path: Path, dead_pid: int, refused) -> None:
    leftover = tmp_path / f".out.{dead_pid}.partial"
    leftover.write_text("left over")
    refused("quantize", tiny, "--to", "q9_0", "-o", tmp_path / "out")
    refused("quantize", tiny, "--to", "q8_0", "--keep", "nothing", "-o", tmp_path / "out")
    assert leftover.exists()


# --- A disk that ends


@pytest.mark.parametrize("old", [False, True], ids=["new", "replaced"])
def test_a_limit_on_file_sizes(start: Starter, model: Path, kind: str, old: bool, tmp_path: Path) -> None:
    """The kernel's own refusal, as of a disk that ends: with room for the small files only."""
    out = tmp_path / "out"
    if old:
        assert start(*command(model, kind, out)) == 0
    before = files_below(tmp_path)
    assert start(*command(model, kind, out, "--overwrite"), file_bytes=50_000) == 2
    (line,) = start.said
    assert line.startswith("error: ") and "cannot be written (File too large)" in line
    assert files_below(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == old


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_full_disk_midway(
    model: Path, kind: str, share: float, tmp_path: Path, refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    line = ["quantize", model, "--to", "q8_0", "-o", out, *command(model, kind, out)[8:]]
    put, room = writer.TensorWriter._put, [10**18]

    def full(self: writer.TensorWriter, offset: int, data: Any) -> None:
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(self, offset, data)

    monkeypatch.setattr(writer.TensorWriter, "_put", full)
    assert run([str(arg) for arg in line]) == 0
    before, taken = files_below(tmp_path), 10**18 - room[0]
    room[0] = int(taken * share)
    assert "the disk is full" in refused(*line, "--overwrite")
    assert files_below(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
