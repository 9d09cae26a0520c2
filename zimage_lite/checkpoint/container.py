"""What every container comes down to: named arrays at byte ranges of a file.

Bytes are read into buffers of our own, never mapped: mapped pages count as the process's memory, and on Windows an
open map forbids replacing the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..errors import FileFormatError, UserError
from .impostors import START_BYTES, no_such, refuse_impostor

Take = Callable[[int], Tensor]  # number of bytes -> a uint8 tensor of so many to write into


def fresh(n_bytes: int) -> Tensor:
    """New CPU memory."""
    return torch.empty(n_bytes, dtype=torch.uint8)


@dataclass(frozen=True)
class Entry:
    """One array. kind: a safetensors dtype ("BF16") or, in GGUF files, a ggml type in lower case ("q8_0")."""

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(self, start: int = 0, nbytes: int | None = None, into: Take = fresh) -> Tensor:
        """Bytes [start, start + nbytes) of the array as a uint8 tensor, in memory that `into` gives."""
        nbytes = self.nbytes - start if nbytes is None else nbytes
        buffer = into(nbytes)
        view = buffer.numpy().data
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.offset + start)
                done = 0
                while done < nbytes:
                    got = file.readinto(view[done:])
                    if not got:
                        raise FileFormatError(
                            f"{self.path}: tensor {self.name} ends early; the file was cut or changed while it was read"
                        )
                    done += got
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        return buffer

    def will_read(self, start: int, nbytes: int) -> None:
        """Have the system read these bytes ahead, where it can be told."""
        self._advise(start, nbytes, "POSIX_FADV_WILLNEED")

    def forget(self, start: int, nbytes: int) -> None:
        """Have the system drop these bytes from its page cache, where it can be told."""
        self._advise(start, nbytes, "POSIX_FADV_DONTNEED")

    def _advise(self, start: int, nbytes: int, advice: str) -> None:
        if not hasattr(os, "posix_fadvise"):
            return
        with suppress(OSError), open(self.path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), self.offset + start, nbytes, getattr(os, advice))


@dataclass(frozen=True)
class TensorFile:
    """A file's header, checked: every entry lies inside the file, and no two overlap."""

    path: Path
    container: str  # "safetensors" or "gguf"
    entries: dict[str, Entry]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    stamp: tuple[int, ...] = ()  # of the file when the header was read


def file_stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file is written to or replaced: size, time of the last change, inode. () if it is gone."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_size, found.st_mtime_ns, found.st_ino


def is_natural(value: object) -> TypeGuard[int]:
    """Below 2^48, so that no product of a few sizes grows into a number that takes long to print."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48


def is_shape(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) <= 8 and all(map(is_natural, value))


def check_ranges(path: Path, entries: list[Entry], file_bytes: int, data_start: int) -> None:
    """Raise FileFormatError unless the byte ranges lie in [data_start, file_bytes) and are disjoint."""
    end, before = data_start, "the header"
    for entry in sorted(entries, key=lambda e: (e.offset, e.nbytes)):
        if entry.offset < end:
            raise FileFormatError(f"{path}: tensor {entry.name[:200]} overlaps {before[:200]}")
        end, before = entry.offset + entry.nbytes, entry.name
        if end > file_bytes:
            raise FileFormatError(
                f"{path}: tensor {entry.name[:200]} ends at byte {end}, but the file has {file_bytes}",
                fix="the file is truncated or damaged, so download or copy it again",
            )


def open_tensor_file(path: Path, file_bytes: Mapping[Path, int] | None = None) -> TensorFile:
    """Read the header of a safetensors or GGUF file, told apart by their first bytes, not by the name.

    file_bytes: sizes of safetensors files of which only the header is there so far.
    """
    from . import gguf, safetensors

    try:
        with open(path, "rb") as file:
            start = file.read(START_BYTES)
    except FileNotFoundError as error:
        raise no_such(path, "no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    stamp = file_stamp(path)
    if start.startswith(b"GGUF"):
        return replace(gguf.read_header(path), stamp=stamp)
    refuse_impostor(path, start)
    return replace(safetensors.read_header(path, (file_bytes or {}).get(path)), stamp=stamp)
