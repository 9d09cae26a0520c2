"""What a download leaves, and servers that die."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from hub_server import PIECE_BYTES, HubServer

REPO = "someone/tiny"
SLACK_BYTES = 300_000  # stubs and small files


def nothing_left(tmp_path: Path) -> bool:
    hidden = [*(tmp_path / "work").iterdir(), *(tmp_path / "cache").glob(".hub-*")]
    return not hidden


def size_of(path: Path) -> int:
    """0 for a folder, and for a file that was renamed a moment ago."""
    with suppress(FileNotFoundError):
        return path.stat().st_size if path.is_file() else 0
    return 0


def cut_for_good(server: HubServer, name: str) -> None:
    """The header comes through, then half of the file, and no attempt to go on gets a further byte."""

    def die(piece_of: str) -> None:
        if piece_of == name and server.served_bytes(name) > PIECE_BYTES:
            raise ConnectionError

    server.on_piece, server.cuts = die, {name: 1}
