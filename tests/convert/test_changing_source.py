"""A source that changes while it is converted is noticed, and nothing is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.convert import job
from zimage_lite.convert.quantize import quantize

pytestmark = pytest.mark.slow  # a conversion for each


def rewritten(file: Path) -> None:
    """In place, with other weights of the same size."""
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def replaced(file: Path) -> None:
    other = file.with_name("new")
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, other)
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    os.replace(other, file)


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def appended(file: Path) -> None:
    with open(file, "ab") as opened:
        opened.write(b"\0")


def touched(file: Path) -> None:
    os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns + 1_000_000))


@pytest.mark.parametrize("change", [rewritten, replaced, truncated, appended, touched, Path.unlink])
@pytest.mark.parametrize(
    ("component", "to"),
    [("transformer", "q4_0"), ("text_encoder", "q4_k_m"), ("text_encoder", "keep"), ("vae", "q8_0")],
)
def test_a_source_that_changes_is_noticed(
    tiny: Path, component: str, to: str, change: Callable[[Path], None], tmp_path: Path, refused, monkeypatch
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    (file,) = (source / component).glob("*.safetensors")
    report, calls = job.Meter.__call__, []

    def meter(self: Any, n_bytes: int) -> None:
        calls.append(n_bytes)
        if len(calls) == 1:
            change(file)
        report(self, n_bytes)

    monkeypatch.setattr(job.Meter, "__call__", meter)
    args = ["--to", "q4_0"] + (["--text-encoder-to", to] if component == "text_encoder" else [])
    line = refused("quantize", source, "-o", tmp_path / "out", *args)
    assert str(file.parent if change is Path.unlink else file) in line
    assert any(
        words in line
        for words in ("got no weights", "changed while it was read", "ends early", "cannot be read", "No such file")
    )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_reading_a_source_does_not_change_it(tiny: Path, tmp_path: Path) -> None:
    stamps = dict(open_checkpoint(tiny / "transformer").stamps)
    quantize(tiny, tmp_path / "out", "q8_0")
    assert dict(open_checkpoint(tiny / "transformer").stamps) == stamps and stamps
