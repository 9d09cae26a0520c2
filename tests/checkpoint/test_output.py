"""Outputs go wherever a shell allows: under the longest names, through links, and with a line where that cannot be."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zimage_lite.checkpoint import output
from zimage_lite.checkpoint.output import clear_leftovers, lies_in, replacing, require_absent, require_apart
from zimage_lite.cli import run
from zimage_lite.errors import UserError

SIZE = ("--width", "64", "--height", "64", "--steps", "1")
LONGEST = [  # 255 bytes each
    "x" * 251 + ".png",
    "画" * 83 + "xx.png",
    "é" * 125 + "x.png",
]


@pytest.mark.parametrize("name", LONGEST)
def test_the_longest_names(tiny: Path, tmp_path: Path, name: str) -> None:
    assert len(name.encode()) == 255
    assert run(["generate", "x", "--model", str(tiny), *SIZE, "-o", str(tmp_path / name)]) == 0
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_the_longest_name_of_weights(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / ("x" * 250 + ".gguf")
    (source,) = (tiny / "transformer").glob("*.safetensors")
    assert run(["quantize", str(source), "--to", "q8_0", "-o", str(out)]) == 0
    assert [file.name for file in tmp_path.iterdir()] == [out.name]


def test_leftovers_of_the_longest_names_are_found(tmp_path: Path) -> None:
    """And those of a name that only begins alike are left alone."""
    ours, other = tmp_path / ("x" * 250 + "a.png"), tmp_path / ("x" * 250 + "b.png")
    left: dict[Path, Path] = {}
    for path in (ours, other):
        with pytest.raises(KeyError), replacing(path) as partial:
            left[path] = partial.with_name(partial.name.replace(f".{os.getpid()}.", ".999999999."))
            raise KeyError
        left[path].write_bytes(b"half")
    assert len(set(left.values())) == 2 and all(len(os.fsencode(file.name)) <= 255 for file in left.values())
    assert clear_leftovers(ours) == [left[ours]]
    assert left[other].exists() and not left[ours].exists()


def test_a_link_to_a_file_is_followed(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    link, target = tmp_path / "link.png", tmp_path / "far" / "image.png"
    link.symlink_to(target)
    assert run(["generate", "x", "--model", str(tiny), *SIZE, "-o", str(link)]) == 0
    assert link.is_symlink() and target.is_file() and not target.is_symlink()


def test_a_link_that_leads_nowhere(tiny: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    loop, gone = tmp_path / "loop.png", tmp_path / "gone.png"
    loop.symlink_to(loop)
    gone.symlink_to(tmp_path / "none" / "x.png")
    line = refused("generate", "x", "--model", tiny, "-o", loop)
    assert line == f"error: {loop}: a link that leads back to itself; choose another name with -o"
    assert "none: no such folder" in refused("generate", "x", "--model", tiny, "-o", gone)
    assert "leads back to itself" in refused("quantize", tiny, "--to", "q8_0", "-o", loop)
    assert loop.is_symlink()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows deletes no folder that is in use")
def test_the_current_folder_was_deleted(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    message = "the current folder has been deleted; cd to one that exists"
    assert message in refused("generate", "x", "--model", tiny, *SIZE)
    assert message in refused("quantize", tiny, "--to", "q8_0")
    for verb in (("generate", "x", "--model", tiny, *SIZE, "-o", tmp_path / "x.png"), ("formats",)):
        assert message in refused(*verb)  # a process that has not loaded torch yet would be ended by MKL


def on_windows(monkeypatch: pytest.MonkeyPatch, path: Path, renamed: bool, tries: int = 1000) -> None:
    """`path` is open elsewhere, at so many tries: it is not replaced, not deleted, and renamed only if it is mapped
    alone. Errors as Windows has them (ERROR_SHARING_VIOLATION)."""
    left, inode = [tries], path.stat().st_ino

    def refusing(call: Callable[..., None], targets: bool) -> Callable[..., None]:
        def called(source: Path, target: Path | None = None, **more: bool) -> None:
            touched = (source, target) if targets else (source,)
            if left[0] and any(one and one.exists() and one.stat().st_ino == inode for one in touched):
                left[0] -= 1
                error = PermissionError(13, "being used by another process")
                error.winerror = 32  # type: ignore[attr-defined]
                raise error
            call(source, **more) if target is None else call(source, target)

        return called

    monkeypatch.setattr(output.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(output.os, "replace", refusing(os.replace, True))
    monkeypatch.setattr(Path, "unlink", refusing(Path.unlink, False))
    if not renamed:
        monkeypatch.setattr(output.os, "rename", refusing(os.rename, True))


@pytest.mark.skipif(sys.platform not in ("linux", "win32"), reason="nothing there tells what is open")
@pytest.mark.parametrize("how", ["open", "mapped", "below"])
def test_what_is_open_here_is_not_deleted(how: str, tmp_path: Path) -> None:
    """Nor replaced nor renamed by our code, in any test, as if all ran on Windows."""
    path = tmp_path / "folder" / "x.bin"
    path.parent.mkdir()
    path.write_bytes(b"old")
    with path.open("r+b") as file:
        held: Any = mmap.mmap(file.fileno(), 0) if how == "mapped" else path.open("rb")
    with held:
        assert not output.discarded(path.parent if how == "below" else path)
    assert output.discarded(path.parent)


def test_a_file_that_a_scanner_has_open_for_a_moment_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    on_windows(monkeypatch, path, renamed=False, tries=3)
    with replacing(path) as partial:
        partial.write_bytes(b"new")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"new"]


def test_a_file_that_another_program_has_mapped_steps_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And goes when it can: with the next run of another process."""
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    with monkeypatch.context() as mapped:
        on_windows(mapped, path, renamed=True)
        with replacing(path) as partial:
            partial.write_bytes(b"new")
        assert path.read_bytes() == b"new"
        (aside,) = set(tmp_path.iterdir()) - {path}
        aside = aside.rename(aside.with_name(aside.name.replace(f".{os.getpid()}.", ".999999999.")))
        assert clear_leftovers(path) == [] and aside.read_bytes() == b"old"
    assert clear_leftovers(path) == [aside] and list(tmp_path.iterdir()) == [path]


def test_a_file_that_stays_open_is_named_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    on_windows(monkeypatch, path, renamed=False)
    told = pytest.raises(UserError, match=r"x\.bin: cannot be written .* close what has it open, or choose")
    with told, replacing(path) as partial:
        partial.write_bytes(b"new")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize(("name", "kept"), [("x.gguf", "x-new1.gguf"), ("model", "model-new1")])
def test_what_took_hours_is_kept_beside_what_stays_open(
    name: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.write_bytes(b"old") if path.suffix else path.mkdir()
    (tmp_path / kept.replace("1", "")).touch()
    on_windows(monkeypatch, path, renamed=False)
    told = pytest.raises(UserError, match=rf"cannot be replaced .*, so the new one is {kept}; close what has it open")
    with told, replacing(path, precious=True) as partial:
        partial.write_bytes(b"new") if path.suffix else partial.mkdir()
    assert {file.name for file in tmp_path.iterdir()} == {name, kept, kept.replace("1", "")}
    assert not path.suffix or ((tmp_path / kept).read_bytes() == b"new" and path.read_bytes() == b"old")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_is_not_finished_is_not(error: BaseException, tmp_path: Path) -> None:
    error.winerror = 32  # type: ignore[attr-defined]
    with pytest.raises((UserError, KeyboardInterrupt)), replacing(tmp_path / "x", precious=True) as partial:
        partial.write_bytes(b"half")
        raise error
    assert not list(tmp_path.iterdir())


def test_an_input_is_known_by_whatever_name(tmp_path: Path) -> None:
    """Here a second name of the same file, for a disk on which upper and lower case are the same."""
    (tmp_path / "model.gguf").touch()
    (tmp_path / "Model.gguf").hardlink_to(tmp_path / "model.gguf")
    with pytest.raises(UserError, match="the output would replace its own source"):
        require_apart(tmp_path / "Model.gguf", [tmp_path / "model.gguf"])
    require_apart(tmp_path / "other.gguf", [tmp_path / "model.gguf"])
    assert lies_in(tmp_path / "none" / "x", tmp_path / "none") and not lies_in(tmp_path / "nonesuch", tmp_path / "none")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_device_or_a_pipe_is_never_replaced(tmp_path: Path) -> None:
    """By root, who may, /dev/null would be."""
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    for refused in (lambda: require_absent(pipe, overwrite=True), replacing(pipe).__enter__):
        with pytest.raises(UserError, match=r"pipe\.png: neither a file nor a folder; choose another name with -o"):
            refused()
    assert pipe.is_fifo()
