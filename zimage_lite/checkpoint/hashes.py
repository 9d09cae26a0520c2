"""SHA-256 of weights files, by which model sites know them.

12 GB take some seconds at best, so a hash is looked for first (in the Hub's cache it is the name of the file), computed
beside the drawing otherwise, and kept by path, size and time of the last change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread

from ..cache_root import cache_root
from ..errors import UserError
from .container import file_stamp
from .output import replacing

UNCACHED_BYTES = 10**9  # at most, is read only to name it where that is to be done anew in each run
_PIECE_BYTES = 1 << 20
_PATIENCE_S = 1.0
_DIGITS = frozenset("0123456789abcdef")


class FileHash:
    """Of the one file that `paths` hold; of several there is none that anyone knows. Computed from `start` on, in a
    thread that dies with the process."""

    def __init__(self, paths: Sequence[Path], keep: bool = True) -> None:
        self._path = paths[0] if len(paths) == 1 else None
        self._folder = cache_root() if keep else None
        self._found = known_sha256(self._path, self._folder) if self._path else None
        self._thread: Thread | None = None

    def start(self) -> FileHash:
        if self._path and not self._found and self._thread is None and self._affordable(self._path):
            self._thread = Thread(target=self._compute, args=(self._path,), name="hashing", daemon=True)
            self._thread.start()
        return self

    def result(self, tell: Callable[[str], object] = lambda line: None) -> str | None:
        """64 hexadecimal digits, waited for; None if nothing is known. tell: gets a line if that takes long."""
        if self._thread and self._path:
            self._thread.join(_PATIENCE_S)
            if self._thread.is_alive():
                tell(f"the hash of {self._path.name} is computed for the picture's recipe, once")
            while self._thread.is_alive():
                self._thread.join(_PATIENCE_S)  # on Windows, one without end cannot be interrupted
        return self._found

    def _affordable(self, path: Path) -> bool:
        stamp = file_stamp(path)
        return bool(stamp) and (self._folder is not None or stamp[0] <= UNCACHED_BYTES)

    def _compute(self, path: Path) -> None:
        stamp = file_stamp(path)
        try:
            found = sha256_of(path)
        except OSError:  # gone meanwhile: the picture says nothing of it
            return
        if file_stamp(path) == stamp:
            self._found = found
            _keep(path, self._folder, stamp, found)


def sha256_of(*paths: Path) -> str:
    """Of files, one after another: 64 hexadecimal digits. Raises OSError."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE_BYTES))
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while n_bytes := file.readinto(piece):
                digest.update(piece[:n_bytes])
    return digest.hexdigest()


def known_sha256(path: Path, folder: Path | None) -> str | None:
    """What the Hub's cache calls the file, or what was kept in `folder` of the file as it is now."""
    real = path.resolve()
    if real.parent.name == "blobs" and len(real.name) == 64 and set(real.name) <= _DIGITS:
        return real.name
    try:
        kept = json.loads(_note(real, folder).read_text(encoding="utf-8")) if folder else {}
        return str(kept["sha256"]) if tuple(kept["stamp"]) == file_stamp(real) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(path: Path, folder: Path | None, stamp: tuple[int, ...], sha256: str) -> None:
    """A cache is never in the way: what cannot be written is not kept."""
    if folder is None:
        return
    note = _note(path.resolve(), folder)
    try:
        note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(note) as partial:
            partial.write_text(json.dumps({"stamp": stamp, "sha256": sha256}), encoding="utf-8")
    except (OSError, UserError):
        return


def _note(path: Path, folder: Path) -> Path:
    return folder / "hashes" / f"{hashlib.sha256(str(path).encode(errors='surrogateescape')).hexdigest()}.json"
