"""The SHA-256 of weights files: computed once, kept, and never of another file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from threading import Event

import pytest

from zimage_lite.checkpoint import hashes
from zimage_lite.checkpoint.hashes import FileHash


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZIMAGE_LITE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.safetensors").write_bytes(os.urandom(3 * 2**20 + 7))
    return tmp_path / "a.safetensors"


def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def never(path: Path) -> str:
    raise AssertionError(f"{path} was read again")


def test_it_is_kept_until_the_file_changes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert FileHash([file]).result() is None  # nobody asked for it to be computed
    first = hash_of(file)
    assert FileHash([file]).start().result() == first
    with monkeypatch.context() as patched:
        patched.setattr(hashes, "sha256_of", never)
        assert FileHash([file]).start().result() == first == FileHash([file]).result()
    file.write_bytes(b"another")
    assert FileHash([file]).start().result() == hash_of(file) != first


def test_the_hubs_cache_knows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / ("ab" * 32)).touch()
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / ("ab" * 32))
    monkeypatch.setattr(hashes, "sha256_of", never)
    assert FileHash([tmp_path / "model.safetensors"]).start().result() == "ab" * 32


def test_without_a_cache_large_files_are_not_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert FileHash([file], keep=False).start().result() == hash_of(file)
    monkeypatch.setattr(hashes, "UNCACHED_BYTES", 1000)
    assert FileHash([file], keep=False).start().result() is None
    assert FileHash([file]).start().result() == hash_of(file)


def test_shards_have_none(file: Path) -> None:
    assert FileHash([file, file]).start().result() is None
    assert FileHash([]).start().result() is None


def test_a_damaged_or_missing_note_is_no_hash(file: Path, tmp_path: Path) -> None:
    FileHash([file]).start().result()
    (note,) = (tmp_path / "cache" / "hashes").iterdir()
    for text in ("", "{", "[]", '{"sha256": 1}'):
        note.write_text(text)
        assert FileHash([file]).start().result() == hash_of(file)


def test_who_waits_long_is_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, told = Event(), list[str]()
    monkeypatch.setattr(hashes, "_PATIENCE_S", 0.01)
    monkeypatch.setattr(hashes, "sha256_of", lambda path: go.wait(60) and "0" * 64)

    def tell(line: str) -> None:
        told.append(line)
        go.set()

    assert FileHash([file]).start().result(tell) == "0" * 64
    assert told == ["the hash of a.safetensors is computed for the picture's recipe, once"]


def test_a_file_that_goes_away_says_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(path: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(hashes, "sha256_of", gone)
    assert FileHash([file]).start().result() is None


def test_a_file_that_changes_meanwhile_is_not_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(path: Path) -> str:
        path.write_bytes(b"changed")
        return "0" * 64

    monkeypatch.setattr(hashes, "sha256_of", slow)
    assert FileHash([file]).start().result() is None
