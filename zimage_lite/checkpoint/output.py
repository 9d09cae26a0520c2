"""Outputs appear whole or not at all, and never in the place of something else. Loads no torch."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from ..errors import UserError
from ..units import format_gb


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary file or folder name beside `path`; on success it is renamed to `path`, otherwise removed.

    Failures of the file system become a UserError.
    """
    path = path.resolve()  # a link's target is what gets replaced, on its own disk
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        _rename(partial, path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"{path}: the disk is full", fix="free some space, or choose another place with -o"
            ) from error
        raise UserError(f"{path}: cannot be written ({error.strerror})", fix="choose another place with -o") from error
    finally:
        _remove(partial)


def clear_leftovers(path: Path) -> list[Path]:
    """Undo what a killed run left beside `path`: its partial outputs go, and an old folder that it had moved aside to
    make room comes back. Returns what was there.
    """
    import psutil

    path = path.resolve()
    found = []
    for kind in ("partial", "old"):
        for leftover in sorted(path.parent.glob(f".{escape(path.name)}.*.{kind}")):
            pid = leftover.name.split(".")[-2]
            if not pid.isdecimal() or psutil.pid_exists(int(pid)):
                continue  # not ours, or a run that goes on
            found.append(leftover)
            if kind == "old" and not path.exists():
                os.rename(leftover, path)
            else:
                _remove(leftover)
    return found


def require_space(folder: Path, n_bytes: int) -> None:
    """Raise UserError unless the disk of `folder` has room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise UserError(
            f"{folder}: not enough room on the disk", got=f"{format_gb(free)} free", expected=format_gb(n_bytes)
        )


def require_absent(path: Path, overwrite: bool) -> None:
    """Raise UserError if `path` exists and may not be replaced, or if its folder cannot take a new entry."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already", fix="choose another name with -o, or add --overwrite")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder", fix="make it first, or choose another place with -o")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: cannot be written to", fix="choose another place with -o")


def _rename(partial: Path, path: Path) -> None:
    """Replace `path`. A folder is replaced by a folder only: the old one steps aside first and is deleted last."""
    if not path.is_dir() or not partial.is_dir():
        os.replace(partial, path)
        return
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    os.rename(path, old)
    try:
        os.rename(partial, path)
    except OSError:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)  # the new one is in place, so what cannot be deleted is no failure


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
