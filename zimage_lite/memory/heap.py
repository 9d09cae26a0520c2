"""Gives freed memory back to the system where the C library would keep it.

glibc takes pieces of up to 32 MB from a heap whose holes fill up with small things: after 35 layers of the text
encoder, which hold 90 MB at a time, it had kept from 0 to 600 MB, another amount in each run (2 threads of a Zen 4).
Mapping each piece anew instead (M_MMAP_THRESHOLD) made a denoising step twice as long; giving back after every block
took 7 % more processor time. A decoder's bands are other pieces, of a few MB to 32 MB, between maps that stay, and its
convolutions compute longer for each byte: there every piece is mapped, so that what is freed is gone.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

KEPT_BYTES = 2**26  # so much may stay: it is used again at once
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_MAPPED_BYTES = 2**20
# Where glibc's own threshold ends, which rises with each mapped piece that is freed: at its first large tensor.
HIGHEST_BYTES = 2**25


class _MallInfo(ctypes.Structure):
    """glibc's mallinfo2, malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
                     "keepcost")
    ]  # fmt: skip


def give_back(kept_bytes: int = KEPT_BYTES) -> None:
    """What is free beyond kept_bytes, wherever it lies in the heap. Does nothing where there is no glibc."""
    libc = _glibc()
    if libc is not None and libc.mallinfo2().fordblks > kept_bytes:
        libc.malloc_trim(0)


@contextmanager
def mapped() -> Iterator[None]:
    """Meanwhile the whole process maps each piece of 1 MB or more on its own. Then glibc's thresholds are what they
    had become by themselves. One that the user has set is left alone; nothing happens where there is no glibc."""
    libc = _glibc()
    if libc is None or _user_has_set_it():
        yield
        return
    libc.malloc_trim(0)
    libc.mallopt(_MMAP_THRESHOLD, _MAPPED_BYTES)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, HIGHEST_BYTES)
        libc.mallopt(_TRIM_THRESHOLD, 2 * HIGHEST_BYTES)


def _user_has_set_it() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return "MALLOC_MMAP_THRESHOLD_" in os.environ or "glibc.malloc.mmap_threshold" in tunables


@cache
def _glibc() -> Any:
    """2.33 or newer, else None."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "malloc_trim") or not hasattr(libc, "mallinfo2"):
        return None
    libc.mallinfo2.restype = _MallInfo  # type: ignore[union-attr]
    return libc
