"""EXIF with two texts: what has been done to the image (of TIFF/EP, ASCII), and the user's comment (UTF-16).

Pillow would write the comment as numbers, which EXIF 2.3 does not allow and some readers do not take.
"""

from __future__ import annotations

import struct
from typing import Any

HISTORY, COMMENT, IFD = 0x9213, 0x9286, 0x8769
MOST_BYTES = 65_000  # it stands in one segment of a JPEG, of at most 65,533 bytes
_ASCII, _LONG, _UNDEFINED = 2, 4, 7
_UNICODE = b"UNICODE\0"
_HEAD = b"MM\0*\0\0\0\x08"  # of a TIFF: most significant byte first, the first directory at byte 8


def written(history: str, comment: str) -> bytes:
    """As Pillow takes it."""
    text = history.encode("ascii", errors="replace") + b"\0"
    history_bytes = text + b"\0" * (len(text) % 2)  # values start at even places
    comment_bytes = _UNICODE + comment.encode("utf-16-be", errors="replace")
    second = len(_HEAD) + _size(2) + len(history_bytes)
    first = _directory((HISTORY, _ASCII, len(text), len(_HEAD) + _size(2)), (IFD, _LONG, 1, second))
    own = _directory((COMMENT, _UNDEFINED, len(comment_bytes), second + _size(1)))
    return b"Exif\0\0" + _HEAD + first + history_bytes + own + comment_bytes


def _directory(*entries: tuple[int, int, int, int]) -> bytes:
    """entries: of each the tag, the type, how many, and where, or the value itself."""
    return struct.pack(">H", len(entries)) + b"".join(struct.pack(">HHLL", *entry) for entry in entries) + bytes(4)


def _size(entries: int) -> int:
    return 2 + 12 * entries + 4


def read(exif: Any) -> tuple[str, str]:
    """History and comment of Pillow's Exif, of whatever program; "" for what is not there."""
    comment = exif.get_ifd(IFD).get(COMMENT, b"")
    if not isinstance(comment, bytes) or not comment.startswith(_UNICODE):
        comment = b""
    history = exif.get(HISTORY, "")
    return history if isinstance(history, str) else "", comment.removeprefix(_UNICODE).decode("utf-16-be", "replace")
