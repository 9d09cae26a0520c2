"""Writes a tensor file whose layout is known before its contents.

The header goes first, so every array has its place, and parts may be written in any order and from several threads.
The file grows under a temporary name beside its destination and takes its own name only when it is complete.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..units import format_gb


class TensorWriter:
    """Use through `open_writer`."""

    def __init__(self, file: FileIO) -> None:
        self._file, self._lock = file, threading.Lock()

    def write(self, offset: int, tensor: Tensor) -> None:
        """Put a contiguous CPU tensor's bytes at `offset` of the file."""
        self._put(offset, tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    def _put(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        with self._lock:
            self._file.seek(offset)
            while view:
                view = view[self._file.write(view) :]


@contextmanager
def open_writer(path: Path, header: bytes, total_bytes: int) -> Iterator[TensorWriter]:
    """Yields a writer; on success the finished file replaces `path`, on any failure nothing is left."""
    with replacing(path) as partial:
        require_space(path.parent, total_bytes)
        with open(partial, "wb", buffering=0) as file:
            file.truncate(total_bytes)
            writer = TensorWriter(file)
            writer._put(0, header)
            yield writer
            os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary file or folder name beside `path`; on success it is renamed to `path`, otherwise removed.

    Failures of the file system become a UserError.
    """
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
    """Replace `path`, which may be a folder: then the old one steps aside first and is deleted last."""
    if not path.is_dir():
        os.replace(partial, path)
        return
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    os.rename(path, old)
    try:
        os.rename(partial, path)
    except OSError:
        os.rename(old, path)
        raise
    shutil.rmtree(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
