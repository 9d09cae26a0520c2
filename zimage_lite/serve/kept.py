"""Pictures that clients sent: on the disk by their hash, once each, while a job of the history was made from them. So
that can be drawn again, and what waits is in nobody's memory. Loads no torch."""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint.output import discarded
from ..config import GenerateOptions
from ..pictures.recipe import sources_told
from ..pictures.saving import save_file
from .fields import PICTURES
from .jobs import OPEN

MOST_BYTES = 2 * 10**9  # then the oldest go whose jobs are over
_SCHEMA = """
CREATE TABLE IF NOT EXISTS kept (sha256 TEXT NOT NULL, job TEXT NOT NULL, bytes INTEGER, UNIQUE (sha256, job));
CREATE INDEX IF NOT EXISTS kept_by_job ON kept (job);
"""
_OLDEST = f"""
SELECT kept.sha256, MAX(kept.bytes) FROM kept LEFT JOIN jobs ON jobs.id = kept.job GROUP BY kept.sha256
HAVING SUM(COALESCE(jobs.state, '{OPEN[0]}') IN {OPEN}) = 0 ORDER BY MAX(kept.rowid)
"""


class KeptPictures:
    """database, lock: the history's. Those of jobs that it does not know are deleted."""

    def __init__(self, folder: Path, database: sqlite3.Connection, lock: AbstractContextManager[Any]) -> None:
        self.folder, self._db, self._lock = folder, database, lock
        folder.mkdir(mode=0o700, exist_ok=True)
        self._db.executescript(_SCHEMA)
        self._db.execute("DELETE FROM kept WHERE job NOT IN (SELECT id FROM jobs)")
        named = {sha256 for (sha256,) in self._db.execute("SELECT sha256 FROM kept")}
        for path in folder.iterdir():
            if path.name not in named:
                discarded(path)

    def of(self, job: str, requests: Sequence[GenerateOptions]) -> list[GenerateOptions]:
        """The requests, of the same pictures, by files in the place of what they hold; these stay until `release`.
        Raises UserError, OSError if they cannot be written."""
        given = {name: getattr(requests[0], name) for name in PICTURES}
        files = {name: self._kept(job, one) for name, one in given.items() if one is not None}
        return [replace(request, **files) for request in requests]

    def _kept(self, job: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._kept(job, one) for one in value)
        raw = value if isinstance(value, bytes) else Path(value).read_bytes()
        sha256 = hashlib.sha256(raw).hexdigest()
        path = self.folder / sha256
        with self._lock:
            if not path.exists():
                save_file(path, raw)
            self._db.execute("INSERT OR IGNORE INTO kept VALUES (?, ?, ?)", (sha256, job, len(raw)))
            self._bound()
        return path

    def release(self, job: str) -> None:
        """What no other job was made from is deleted."""
        with self._lock:
            mine = self._db.execute("SELECT sha256 FROM kept WHERE job = ?", (job,)).fetchall()
            self._db.execute("DELETE FROM kept WHERE job = ?", (job,))
            for (sha256,) in mine:
                if not self._db.execute("SELECT 1 FROM kept WHERE sha256 = ?", (sha256,)).fetchone():
                    discarded(self.folder / sha256)  # else when the next server starts

    def path(self, sha256: object) -> Path | None:
        """Of one that is kept."""
        if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
            return None
        path = self.folder / sha256
        return path if path.is_file() else None

    def _bound(self) -> None:
        (total,) = self._db.execute("SELECT SUM(bytes) FROM (SELECT DISTINCT sha256, bytes FROM kept)").fetchone()
        for sha256, n_bytes in self._db.execute(_OLDEST).fetchall() if total > MOST_BYTES else ():
            self._db.execute("DELETE FROM kept WHERE sha256 = ?", (sha256,))
            discarded(self.folder / sha256)
            total -= n_bytes
            if total <= MOST_BYTES:
                break


def told(request: GenerateOptions) -> dict[str, Any]:
    """What a picture says of those that it was made from: hashes alone, as they came without names."""
    return {name: _hash_alone(value) for name, value in sources_told(request).items()}


def _hash_alone(value: Any) -> Any:
    return [_hash_alone(one) for one in value] if isinstance(value, list) else {"sha256": value["sha256"]}
