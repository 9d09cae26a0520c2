"""Outputs appear whole or not at all, and never in the place of something else. Loads no torch."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from itertools import count
from pathlib import Path, PurePath

from ..errors import UserError
from ..units import format_gb

MAX_NAME_BYTES = 255  # of every file system in use
ADDED_BYTES = len("..4294967295.partial")  # with the largest process id
# Windows replaces and deletes nothing that is open elsewhere (ERROR_ACCESS_DENIED, ERROR_SHARING_VIOLATION,
# ERROR_LOCK_VIOLATION, ERROR_USER_MAPPED_FILE), and what was just written a virus scanner or an indexer opens for a
# moment: pip tries for a second.
_HELD, _WAITS_S = (5, 32, 33, 1224), (0.05, 0.1, 0.2, 0.4, 0.8)
_NOT_ON_WINDOWS = re.compile(r"[<>:\"|?*\0-\x1f]|^(con|prn|aux|nul|com[1-9]|lpt[1-9]) *(\..*)?$", re.IGNORECASE)


@contextmanager
def replacing(path: Path, flag: str = "-o", precious: bool = False) -> Iterator[Path]:
    """Yields a temporary file or folder name beside `path`; on success it is renamed to `path`, otherwise removed.

    Failures of the file system become a UserError. flag: what named the path. precious: what is finished, and cannot
    take the place of what is open elsewhere, is kept under another name.
    """
    path = followed(path, flag)  # a link's target is what gets replaced, on its own disk
    partial, finished = path.with_name(f".{_stem(path)}.{os.getpid()}.partial"), False
    try:
        yield partial
        finished = True
        _rename(partial, path)
    except OSError as error:
        if finished and precious and is_held(error):
            raise _kept(partial, path, error) from error
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"{path}: the disk is full", fix=f"free some space, or choose another place with {flag}"
            ) from error
        held = "close what has it open, or " if is_held(error) else ""
        fix = f"{held}choose another place with {flag}"
        raise UserError(f"{path}: cannot be written ({error.strerror})", fix=fix) from error
    finally:
        discarded(partial)


def clear_leftovers(path: Path) -> list[Path]:
    """Undo what a killed run left beside `path`: its partial outputs go, and an old folder that it had moved aside to
    make room comes back. Returns what was there.
    """
    import psutil

    path = followed(path)
    found = []
    for kind in ("partial", "old"):
        for leftover in sorted(path.parent.glob(f".{escape(_stem(path))}.*.{kind}")):
            pid = leftover.name.split(".")[-2]
            if not pid.isdecimal() or psutil.pid_exists(int(pid)):
                continue  # not ours, or a run that goes on
            if kind == "old" and not path.exists():
                os.rename(leftover, path)
            elif not discarded(leftover):
                continue  # somebody has it open still
            found.append(leftover)
    return found


def followed(path: Path, flag: str = "-o") -> Path:
    """Where an output really goes, links followed. Raises UserError if it leads nowhere, or to a device or a pipe: root
    would replace /dev/null."""
    try:
        found = path.resolve()
    except FileNotFoundError as error:
        raise UserError("the current folder has been deleted", fix="cd to one that exists") from error
    except (RuntimeError, OSError):  # before Python 3.13, a loop
        found = path
    if found.is_symlink():
        raise UserError(f"{path}: a link that leads back to itself", fix=f"choose another name with {flag}")
    if found.exists() and not (found.is_file() or found.is_dir()):
        raise UserError(f"{path}: neither a file nor a folder", fix=f"choose another name with {flag}")
    return found


def _stem(path: Path) -> str:
    """The name for a file beside `path`, which adds a process id and a word, and may not take more than 255 bytes."""
    raw = os.fsencode(path.name)
    if len(raw) <= MAX_NAME_BYTES - ADDED_BYTES:
        return path.name
    digest = hashlib.sha256(raw).hexdigest()[:16]
    return raw[: MAX_NAME_BYTES - ADDED_BYTES - 17].decode(errors="ignore") + "-" + digest


def require_space(folder: Path, n_bytes: int) -> None:
    """Raise UserError unless the disk of `folder` has room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise UserError(
            f"{folder}: not enough room on the disk", got=f"{format_gb(free)} free", expected=format_gb(n_bytes)
        )


def require_absent(path: Path, overwrite: bool, flag: str = "-o") -> None:
    """Raise UserError if `path` exists and may not be replaced, or if its folder cannot take a new entry."""
    if sys.platform == "win32" and (name := unknown_to_windows(path)):
        raise UserError(f"{path}: Windows has no such names", got=name, fix=f"choose another name with {flag}")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already", fix=f"choose another name with {flag}, or add --overwrite")
    folder = followed(path, flag).parent
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder", fix=f"make it first, or choose another place with {flag}")
    if not _takes_files(folder):
        raise UserError(f"{folder}: cannot be written to", fix=f"choose another place with {flag}")


def _takes_files(folder: Path) -> bool:
    if sys.platform != "win32":
        return os.access(folder, os.W_OK)
    probe = folder / f".{os.getpid()}.probe"  # `access` holds every folder to be writable there
    try:
        probe.touch()
    except OSError:
        return False
    with suppress(OSError):
        patiently(os.unlink, probe)
    return True


def unknown_to_windows(path: PurePath) -> str | None:
    """The first name in a path that stands for something else there: another file's stream behind a colon, a device
    (Microsoft, "Naming Files, Paths, and Namespaces")."""
    names = path.parts[1:] if path.anchor else path.parts
    return next((name for name in names if _NOT_ON_WINDOWS.search(name)), None)


def require_apart(out: Path, inputs: Iterable[Path], flag: str = "-o") -> None:
    """Raise UserError if writing `out` would replace one of the inputs or a folder around one, links followed."""
    if any(lies_in(file, out) for file in inputs):
        raise UserError(f"{out}: the output would replace its own source", fix=f"choose another name with {flag}")


def require_outside(out: Path, inputs: Iterable[Path], flag: str = "-o") -> None:
    """Raise UserError if `out` is one of the inputs, or in one that is a folder, by its name or where links lead."""
    for place in inputs:
        if lies_in(out, place):
            said = "lies in a folder that is read" if place.is_dir() else "the output would replace its own source"
            raise UserError(f"{out}: {said}", fix=f"choose another name with {flag}")


def lies_in(path: Path, place: Path) -> bool:
    """Whether `path`, or what it links to, is `place` or below it."""
    around = path, *path.absolute().parents, *path.resolve().parents
    return identity(place) in set(map(identity, around))


def identity(path: str | Path) -> object:
    """The same for all names of a file: disks of macOS and Windows do not tell q8_0 from Q8_0, and on macOS `resolve`
    leaves either as it is written. Of what is not there, its name with links followed."""
    with suppress(OSError, ValueError):
        found = os.stat(path)
        if found.st_ino:  # else of a file system that does not count
            return found.st_dev, found.st_ino
    return Path(os.path.realpath(path))


def is_held(error: BaseException | None) -> bool:
    """Whether Windows refuses something because a file is open."""
    return getattr(error, "winerror", None) in _HELD


def discarded(path: Path) -> bool:
    """Delete a file or a folder if that can be, and return whether it is gone: Windows keeps what is open anywhere."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
    return not path.exists()


def _rename(partial: Path, path: Path) -> None:
    """Replace `path`. A folder, which is replaced by a folder only, steps aside first and is deleted last, and so does
    a file that cannot be replaced: on Windows one that is mapped, which may be renamed all the same."""
    folders = path.is_dir() and partial.is_dir()
    try:
        if not folders:
            return patiently(os.replace, partial, path)
    except OSError as error:
        if not is_held(error) or not path.is_file():
            raise
    old = path.with_name(f".{_stem(path)}.{os.getpid()}.old")
    patiently(os.rename, path, old)
    try:
        patiently(os.rename, partial, path)
    except OSError:
        os.rename(old, path)
        raise
    discarded(old)  # the new one is in place, so what cannot be deleted is no failure


def _kept(partial: Path, path: Path, error: OSError) -> UserError:
    """Gives what is finished a name of its own."""
    names = (path.with_name(f"{path.stem}-new{number or ''}{path.suffix}") for number in count())
    kept = next(name for name in names if not name.exists())
    patiently(os.rename, partial, kept)
    fix = "close what has it open, and rename the new one"
    return UserError(f"{path}: cannot be replaced ({error.strerror}), so the new one is {kept.name}", fix=fix)


def patiently(change: Callable[..., None], *paths: Path) -> None:
    """change(*paths), tried again for a while where Windows says that somebody has one of them open."""
    for wait_s in _WAITS_S:
        try:
            return change(*paths)
        except OSError as error:
            if not is_held(error):
                raise
        time.sleep(wait_s)
    return change(*paths)
