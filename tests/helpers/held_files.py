"""What Windows forbids and Linux allows: to replace, rename or delete what this very process has open or mapped. For
calls of our own code alone; libraries have other ways there."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_OURS = tuple(f"{Path(__file__).parents[2] / tree}{os.sep}" for tree in ("zimage_lite", "kernels", "integrations"))
_BETWEEN = ("pathlib", "shutil", "tempfile", "weakref", "contextlib")  # what we call that calls os
_TARGETS = {"replace": 2, "rename": 2, "unlink": 1, "remove": 1, "rmdir": 1}  # paths that it takes
_SHARING_VIOLATION = 32


def install() -> None:
    """For the rest of the process. Does nothing where there is no /proc."""
    if sys.platform == "linux":
        for name, count in _TARGETS.items():
            setattr(os, name, _as_windows(getattr(os, name), count))


def _as_windows(call: Callable[..., None], count: int) -> Callable[..., None]:
    def called(*paths: Any, **options: Any) -> None:
        if _is_ours():
            folder = f"/proc/self/fd/{options['dir_fd']}" if options.get("dir_fd") is not None else ""
            for path in paths[:count]:
                if held := list(_held(os.path.join(folder, os.fspath(path)))):
                    error = PermissionError(13, f"open or mapped in this process: {held[0]}", path)
                    error.winerror = _SHARING_VIOLATION  # type: ignore[attr-defined]
                    raise error
        call(*paths, **options)

    return called


def _is_ours() -> bool:
    """Whether the call comes from our code, if by way of the standard library."""
    frame = sys._getframe(2)
    while frame and Path(frame.f_code.co_filename).stem in _BETWEEN:
        frame = frame.f_back
    return bool(frame) and frame.f_code.co_filename.startswith(_OURS)


def _held(path: str) -> Iterator[str]:
    """Files at or below it that this process has."""
    place = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    for number in os.listdir("/proc/self/fd"):
        try:
            there = os.readlink(f"/proc/self/fd/{number}")
        except OSError:  # what listed them
            continue
        if (there == place or there.startswith(f"{place}/")) and not os.path.isdir(there):
            yield there
    with open("/proc/self/maps", encoding="utf-8") as lines:
        mapped = {line.rstrip("\n").split(None, 5)[-1] for line in lines if "/" in line}
    yield from (there for there in mapped if there == place or there.startswith(f"{place}/"))
