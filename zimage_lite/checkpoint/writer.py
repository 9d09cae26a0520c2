"""Writes a tensor file whose layout is known before its contents.

The header goes first, so every array has its place, and parts may be written in any order and from several threads.
The file grows under a temporary name beside its destination and takes its own name only when it is complete.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from .output import replacing, require_space


class TensorWriter:
    """Use through `open_writer`."""

    def __init__(self, file: FileIO) -> None:
        self._file, self._lock = file, threading.Lock()

    def write(self, offset: int, tensor: Tensor) -> None:
        """Put a contiguous CPU tensor's bytes at `offset` of the file."""
        self._put(offset, tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    def holds(self, offset: int, tensor: Tensor) -> bool:
        """Whether the file has a contiguous CPU tensor's bytes at `offset`."""
        expected = tensor.contiguous().flatten().view(torch.uint8)
        found = torch.empty_like(expected)
        view = found.numpy().data
        with self._lock:
            self._file.seek(offset)
            done = 0
            while done < len(view):
                done += self._file.readinto(view[done:]) or len(view)
        return torch.equal(found, expected)

    def _put(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        if hasattr(os, "pwrite"):  # not on Windows
            while view:
                done = os.pwrite(self._file.fileno(), view, offset)
                view, offset = view[done:], offset + done
            return
        with self._lock:
            self._file.seek(offset)
            while view:
                view = view[self._file.write(view) :]


@contextmanager
def open_writer(path: Path, header: bytes, total_bytes: int, precious: bool = False) -> Iterator[TensorWriter]:
    """Yields a writer; on success the finished file replaces `path`, on any failure nothing is left. precious: see
    `replacing`."""
    with replacing(path, precious=precious) as partial, open_new(partial, header, total_bytes) as writer:
        yield writer


@contextmanager
def open_new(path: Path, header: bytes, total_bytes: int) -> Iterator[TensorWriter]:
    """Yields a writer of a file that is there at once, for a `path` that is a temporary one."""
    require_space(path.parent, total_bytes)
    with open(path, "w+b", buffering=0) as file:
        file.truncate(total_bytes)
        writer = TensorWriter(file)
        writer._put(0, header)
        yield writer
        os.fsync(file.fileno())
