"""What was asked for and drawn, in an SQLite file, with the pictures in a folder beside it. Loads no torch.

A row is there before a job runs, and a picture's row only after its file, whole. So after a crash every picture that is
told of is there, and a job that was not over is known to be lost.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from threading import RLock
from typing import Any

from ..checkpoint.output import discarded
from ..errors import UserError
from ..pictures.saving import save_file
from .jobs import LOST, OPEN, Job, Picture
from .kept import KeptPictures
from .options import GIVEN

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, state TEXT NOT NULL, created REAL NOT NULL, facts TEXT NOT NULL, settings TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS by_time ON jobs (created);
CREATE TABLE IF NOT EXISTS pictures (
    name TEXT PRIMARY KEY, job TEXT NOT NULL, width INTEGER, height INTEGER, seed INTEGER, bytes INTEGER
);
CREATE INDEX IF NOT EXISTS by_job ON pictures (job);
"""
_VERSION = 1
_LOST = {"code": "lost", "message": "the server stopped before this was drawn"}


class StorageError(UserError):
    """The disk does not take it."""


class History:
    """folder: made if it is not there, readable by its owner only. Raises UserError for one that cannot be used."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._lock = folder / "pictures", RLock()
        self._deleted: set[Path] = set()  # but there still, as a client reads them, which Windows waits for
        try:
            for place in (folder, self.folder):
                place.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._db = sqlite3.connect(folder / "history.sqlite", check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.executescript(_SCHEMA)
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if not version:
                self._db.execute(f"PRAGMA user_version={_VERSION}")
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"{folder}: no history can be kept there ({error})", fix="name another --folder") from error
        if version > _VERSION:
            raise UserError(f"{folder}: a history of a newer version", fix="name another --folder, or update")
        self._clear_partial()
        self.kept = KeptPictures(folder / GIVEN, self._db, self._lock)

    def lost(self) -> list[str]:
        """The jobs that were not over when the last server stopped; they are over now."""
        with self._lock:
            rows = self._db.execute("SELECT id, facts FROM jobs WHERE state IN (?, ?)", OPEN).fetchall()
            for job_id, facts in rows:
                self._write(job_id, LOST, {**json.loads(facts), "state": LOST, "error": _LOST, "position": None})
            return [job_id for job_id, _ in rows]

    def put(self, job: Job, settings: Mapping[str, Any] | None = None) -> None:
        """As it is now. settings: what was asked for, when it is new. Raises StorageError."""
        facts = {name: value for name, value in job.facts().items() if name not in ("pictures", "version")}
        try:
            with self._lock:
                if settings is not None:
                    row = job.id, job.state, job.created, json.dumps(facts), json.dumps(settings)
                    self._db.execute("INSERT INTO jobs VALUES (?, ?, ?, ?, ?)", row)
                else:
                    self._write(job.id, job.state, facts)
        except sqlite3.Error as error:
            raise StorageError(f"the history cannot be written: {error}") from error

    def _write(self, job_id: str, state: str, facts: Mapping[str, Any]) -> None:
        self._db.execute("UPDATE jobs SET state = ?, facts = ? WHERE id = ?", (state, json.dumps(facts), job_id))

    def add(self, job: Job, number: int, size: tuple[int, int], file: bytes) -> Picture:
        """file: what is in it; its name is made here. Raises StorageError."""
        picture = Picture(f"{job.id}-{number + 1}.png", *size, job.requests[number].seed)
        path = self.folder / picture.name
        try:
            save_file(path, file)
            row = picture.name, job.id, *size, picture.seed, len(file)
            with self._lock:
                self._db.execute("INSERT OR REPLACE INTO pictures VALUES (?, ?, ?, ?, ?, ?)", row)
        except (UserError, OSError, sqlite3.Error) as error:
            raise StorageError(f"the picture cannot be kept: {error}") from error
        return picture

    def picture(self, name: str) -> Path | None:
        """Only what the history itself has named; whatever else a client sends finds nothing."""
        with self._lock:
            found = self._db.execute("SELECT name FROM pictures WHERE name = ?", (name,)).fetchone()
        path = self.folder / found[0] if found else None
        return path if path and path.is_file() else None

    def jobs(self, limit: int, before: float | None = None) -> list[dict[str, Any]]:
        """The newest first. before: a time of creation."""
        query = "SELECT id, facts, settings FROM jobs WHERE created < ? ORDER BY created DESC, id LIMIT ?"
        with self._lock:
            rows = self._db.execute(query, (1e12 if before is None else before, limit)).fetchall()
            return [self._told(*row) for row in rows]

    def job(self, job_id: str) -> dict[str, Any] | None:
        with self._lock:
            row = self._db.execute("SELECT id, facts, settings FROM jobs WHERE id = ?", (job_id,)).fetchone()
            return self._told(*row) if row else None

    def delete(self, job_id: str) -> bool:
        """With its pictures, and those that it alone was made from. False if there is none."""
        with self._lock:
            names = self._db.execute("SELECT name FROM pictures WHERE job = ?", (job_id,)).fetchall()
            self._db.execute("DELETE FROM pictures WHERE job = ?", (job_id,))
            gone = self._db.execute("DELETE FROM jobs WHERE id = ?", (job_id,)).rowcount
            self._deleted |= {self.folder / name for (name,) in names}
            self._delete_files()
        self.kept.release(job_id)
        return bool(gone)

    def close(self) -> None:
        with self._lock:
            self._delete_files()
            self._db.close()

    def _delete_files(self) -> None:
        self._deleted = {path for path in self._deleted if not discarded(path)}

    def _told(self, job_id: str, facts: str, settings: str) -> dict[str, Any]:
        query = "SELECT name, width, height, seed FROM pictures WHERE job = ? ORDER BY rowid"
        pictures = [Picture(*row).facts() for row in self._db.execute(query, (job_id,))]
        return {**json.loads(facts), "pictures": pictures, "settings": json.loads(settings)}

    def _clear_partial(self) -> None:
        """What a server that was killed left half-written."""
        for path in self.folder.glob(".*.partial"):
            discarded(path)
