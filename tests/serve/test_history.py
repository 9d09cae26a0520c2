"""What a restart finds: all that was drawn, and word of what was not."""

from __future__ import annotations

import sqlite3
import stat
import sys
from pathlib import Path

import pytest

from zimage_lite.config import GenerateOptions
from zimage_lite.errors import UserError
from zimage_lite.serve.history import History, StorageError
from zimage_lite.serve.jobs import DONE, LOST, QUEUED, RUNNING, Failure, Job


def job(prompt: str = "x", state: str = QUEUED, created: float = 1.0) -> Job:
    return Job("demo", [GenerateOptions(prompt, seed=seed) for seed in (3, 4)], state=state, created=created)


def test_a_restart_loses_nothing_that_was_done_and_says_what_was_not(tmp_path: Path) -> None:
    first, jobs = History(tmp_path), [job(str(n), created=n) for n in range(4)]
    for one, state in zip(jobs, (DONE, RUNNING, QUEUED, LOST), strict=True):
        first.put(one, {"prompt": one.requests[0].prompt})
        one.state = state
        first.put(one)
    for number in (0, 1):
        first.add(jobs[0], number, (64, 48), b"picture")
    second = History(tmp_path)  # the first was killed: nothing was closed
    assert sorted(second.lost()) == sorted(one.id for one in jobs[1:3])
    assert second.lost() == []
    found = {facts["id"]: facts for facts in second.jobs(10)}
    assert [found[one.id]["state"] for one in jobs] == [DONE, LOST, LOST, LOST]
    assert found[jobs[1].id]["error"]["message"] == "the server stopped before this was drawn"
    assert [picture["seed"] for picture in found[jobs[0].id]["pictures"]] == [3, 4]
    for picture in found[jobs[0].id]["pictures"]:
        assert second.picture(picture["name"]).read_bytes() == b"picture"
    assert [facts["prompt"] for facts in second.jobs(2, before=3.0)] == ["2", "1"]
    assert second.job(jobs[0].id)["settings"] == {"prompt": "0"} and second.job("none") is None


def test_a_picture_that_cannot_be_written_is_told_of_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    history, one = History(tmp_path), job()
    history.put(one, {})
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match=r"the picture cannot be kept: .* the disk is full"):
        history.add(one, 0, (1, 1), b"picture")
    assert history.job(one.id)["pictures"] == []


def test_what_a_killed_server_left_half_written_goes(tmp_path: Path) -> None:
    History(tmp_path)
    (tmp_path / "pictures" / ".ab-1.png.123.partial").touch()
    (tmp_path / "pictures" / "ab-1.png").touch()
    History(tmp_path)
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["ab-1.png"]


@pytest.mark.parametrize("name", ["../history.sqlite", "..%2fhistory.sqlite", "/etc/passwd", "x.png", "", "%", "\0"])
def test_no_name_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    history = History(tmp_path)
    (tmp_path / "pictures" / "x.png").touch()  # there, but not ours
    assert history.picture(name) is None


def test_deleting(tmp_path: Path) -> None:
    history, one, other = History(tmp_path), job(), job()
    for each in (one, other):
        history.put(each, {})
        history.add(each, 0, (1, 1), b"picture")
    assert history.delete(one.id) and not history.delete(one.id)
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == [f"{other.id}-1.png"]
    assert history.job(one.id) is None and len(history.jobs(10)) == 1


def test_what_a_client_reads_is_deleted_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows, where an open file cannot be deleted."""

    def refused(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "being used by another process")

    history, jobs, files = History(tmp_path), [job(), job()], tmp_path / "pictures"
    for one in jobs:
        history.put(one, {})
        history.add(one, 0, (1, 1), b"picture")
    with monkeypatch.context() as held:
        held.setattr(Path, "unlink", refused)
        assert history.delete(jobs[0].id)
    assert history.job(jobs[0].id) is None and len(list(files.iterdir())) == 2
    assert history.delete(jobs[1].id) and not list(files.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="no such permissions there")
def test_others_on_the_machine_do_not_see_it(tmp_path: Path) -> None:
    History(tmp_path / "own" / "folder")
    for folder in (tmp_path / "own" / "folder", tmp_path / "own" / "folder" / "pictures"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "history.sqlite").write_text("not a database, but long enough to be looked at as one" * 100)
    with pytest.raises(UserError, match="no history can be kept there"):
        History(tmp_path)
    (tmp_path / "pictures.txt").touch()
    with pytest.raises(UserError, match="no history can be kept there"):
        History(tmp_path / "pictures.txt")


def test_a_newer_history_is_left_alone(tmp_path: Path) -> None:
    History(tmp_path).close()
    with sqlite3.connect(tmp_path / "history.sqlite") as database:
        database.execute("PRAGMA user_version=2")
    database.close()
    with pytest.raises(UserError, match="a newer version"):
        History(tmp_path)
    with sqlite3.connect(tmp_path / "history.sqlite") as database:
        assert database.execute("PRAGMA user_version").fetchone() == (2,)
    database.close()


def test_a_failure_is_kept(tmp_path: Path) -> None:
    history, one = History(tmp_path), job()
    history.put(one, {})
    one.failure = Failure("too_large", "it does not fit")
    history.put(one)
    assert history.job(one.id)["error"] == {"code": "too_large", "message": "it does not fit"}
