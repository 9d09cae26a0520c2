"""What people have under the name of a model that is none: told by its first bytes, or by how a path reads, with what
to do about it. Loads no torch."""

from __future__ import annotations

import re
from pathlib import Path, PurePath

from ..errors import FileFormatError, UserError

START_BYTES = 512  # tell enough

_ADDRESS = re.compile(r"(?:https?:/+)(?P<host>[^/]+)/(?P<path>[^?#]*)", re.IGNORECASE)
_HUB = re.compile(r"(www\.)?(huggingface\.co|hf\.co|hf-mirror\.com)", re.IGNORECASE)
_CACHED = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")

_LFS = b"version https://git-lfs.github.com/spec/"
_ZIP = b"PK\x03\x04"
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_BLANK = b"\xef\xbb\xbf \t\r\n"
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml")
_ARCHIVES = {b"7z\xbc\xaf\x27\x1c": "a 7z archive", b"\x1f\x8b": "a gzip archive", b"Rar!": "a RAR archive"}


def foreign_kind(start: bytes) -> tuple[str, str] | None:
    """What a file that begins so is, whatever was meant to be in it, and what to do; None if it may be what was meant.
    start: its first START_BYTES, or all of it."""
    if not start:
        return "the file is empty", "download it again"
    if start.startswith(_LFS):
        return "a git LFS pointer, not the file that it stands for", "run `git lfs pull`, or download the file"
    if start.lstrip(_BLANK).lower().startswith(_PAGES):
        return "a web page (a login, or an error) saved under this name", "download the file itself"
    if start.count(0) == len(start):
        return "it begins with nothing but zeros, so its download was never finished", "download it again"
    archive = next((name for magic, name in _ARCHIVES.items() if start.startswith(magic)), None)
    return (archive, "unpack it and name the file inside") if archive else None


def refuse_impostor(path: Path, start: bytes) -> None:
    """Raise FileFormatError if a file that begins so is none of tensors. start: its first START_BYTES, or all of it."""
    if start[4:9] == b"\0\0\0\0{":  # the length of a safetensors header, and its first character
        return
    found = foreign_kind(start)
    if start.lstrip(_BLANK).startswith((b"{", b"[")):
        found = "a JSON text, not weights", "name the folder that it lies in, or the weights file"
    elif start.startswith(_ZIP) and b"data.pkl" not in start and path.suffix == ".zip":
        found = "a zip archive", "unpack it and name the file inside"
    elif start.startswith((_ZIP, *_PICKLES)):
        why = "a pickle file can run any code when it is opened, so it is refused"
        found = why, "get the safetensors or GGUF version"
    if found:
        raise FileFormatError(f"{path}: {found[0]}", fix=found[1])


def no_such(path: PurePath | str, what: str = "no such file or folder", expected: str | None = None) -> UserError:
    """The error for a path that does not exist: also for one that is an address, which Path makes https:/..."""
    text = path.as_posix() if isinstance(path, PurePath) else path  # on Windows it is https:\...
    found = _ADDRESS.match(f"https://{text}" if _HUB.fullmatch(text.partition("/")[0]) else text)
    if not found:
        return UserError(f"{path}: {what}", expected=expected)
    parts = found["path"].strip("/").split("/")
    if not _HUB.fullmatch(found["host"]) or len(parts) < 2:
        return UserError(f"{path}: this is an address", fix="download the file and name it by its path")
    if len(parts) > 3 and parts[2] in ("resolve", "blob"):
        return UserError(f"{path}: this is the address of a file", fix="download it and name it by its path")
    return UserError(f"{path}: this is an address", fix=f"name the model as {parts[0]}/{parts[1]}")


def refuse_cache_root(folder: Path) -> None:
    """Raise UserError for a model's folder in the Hub's cache, whose files lie further down, or for the whole cache."""
    snapshots = list((folder / "snapshots").iterdir()) if (folder / "snapshots").is_dir() else []
    model = _CACHED.fullmatch(folder.absolute().name)
    if snapshots and model:
        newest = max(snapshots, key=lambda snapshot: snapshot.stat().st_mtime)
        fix = f"name {model['owner']}/{model['name']}, or {newest}"
        raise UserError(f"{folder}: this is a model's folder in the Hub's cache", fix=fix)
    inside = [entry.name for entry in sorted(folder.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    named = [_CACHED.fullmatch(name) for name in inside if not name.startswith(("datasets--", "spaces--"))]
    if named and named[0] and all(named):
        fix = f"name a model in it, such as {named[0]['owner']}/{named[0]['name']}"
        raise UserError(f"{folder}: this is the Hub's cache, not a model", fix=fix)
