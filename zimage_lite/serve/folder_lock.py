"""One server for a folder: a second one would take the jobs of the first for lost, and clear away what it writes."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import IO

from ..errors import UserError

_log = logging.getLogger(__name__)


def locked(folder: Path) -> IO[bytes]:
    """Until the file is closed, or the process ends in whatever way: the system holds the lock. folder: made if it is
    not there. Raises UserError if another server has it, or no file can be opened there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = (folder / "lock").open("ab")
    except OSError as error:
        raise UserError(f"{folder}: no history can be kept there ({error})", fix="name another --folder") from error
    try:
        _lock(file)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise UserError(f"{folder}: another server draws into it", fix="end that, or name another --folder") from error
    except OSError as error:  # some file systems of a network
        _log.warning("%s: cannot be locked (%s): see that no other server draws into it", folder, error.strerror)
    return file


if sys.platform == "win32":
    import msvcrt

    def _lock(file: IO[bytes]) -> None:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # PermissionError if it is locked
else:
    import fcntl

    def _lock(file: IO[bytes]) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
