"""stdout and stderr that outlive the terminal or pipe behind them: a line that nobody can see must not cost an image.

It is done below every buffer, where click, rich, warnings and tracebacks all end, so that nothing is left to be written
when Python ends, either.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

_GONE = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO}  # a reader that left, a terminal that was closed


class _Outlet(io.FileIO):
    """Drops what cannot be written. lost: why, unless it was that nobody is there to read."""

    lost: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            if not _is_gone(error):
                self.lost = error
            written = None
        return memoryview(data).nbytes if written is None else written  # None as well where it would have to wait


def _is_gone(error: OSError) -> bool:
    """Of a pipe whose reader left, Windows says EINVAL (CPython's issues 19612 and 30418)."""
    return error.errno in _GONE or (sys.platform == "win32" and error.errno == errno.EINVAL)


def outlive_readers() -> None:
    """Rebind sys.stdout and sys.stderr. A console of Windows is left as it is: it does not go without its programs."""
    _open_standard_files()
    sys.stdout, sys.stderr = _outliving(sys.stdout, 1), _outliving(sys.stderr, 2)


def lost_output() -> OSError | None:
    """Why stdout lacks something, such as a full disk. None where all was written, or whoever read it left."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.lost if isinstance(raw, _Outlet) else None


def _open_standard_files() -> None:
    """A shell's >&- closes them; the next file that is opened, an image perhaps, would get the number, and all that
    libraries write to it."""
    for number in (0, 1, 2):
        if not _is_open(number):
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _outliving(stream: TextIO | None, number: int) -> TextIO:
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # PYTHONUNBUFFERED leaves out the one between
    if stream is not None and type(raw) is not io.FileIO:
        return stream
    encoding = stream.encoding if stream else "utf-8"
    errors = stream.errors if stream else "strict"
    return io.TextIOWrapper(
        io.BufferedWriter(_Outlet(number, "w", closefd=False)),
        encoding,
        "backslashreplace" if errors == "strict" else errors,  # Windows knows few characters in a redirected stdout
        line_buffering=True,
    )
