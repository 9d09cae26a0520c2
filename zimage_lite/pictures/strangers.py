"""What people name as a picture that is none, or none that Pillow reads: told by its first bytes, with what to do."""

from __future__ import annotations

from ..checkpoint.impostors import foreign_kind

_EXPORT = "export it as PNG or JPEG"
_KINDS: dict[bytes, tuple[str, str]] = {
    b"%PDF": ("a PDF document", _EXPORT),
    b"gimp xcf": ("a project of GIMP's", _EXPORT),
    b"PK\x03\x04": ("a zip archive, or a project of Krita's", f"unpack it, or {_EXPORT}"),
    b"\xff\x0a": ("a JPEG XL picture", _EXPORT),
    b"\0\0\0\x0cJXL ": ("a JPEG XL picture", _EXPORT),
    b"GGUF": ("a file of weights", "name a picture"),
    b"\x1aE\xdf\xa3": ("a video", "save one of its frames as PNG"),
}
_PHOTOS = frozenset(b"heic heix heim hevc mif1 msf1 avif avis crx".split())  # begin as videos do


def kind_of(start: bytes) -> tuple[str, str] | None:
    """What a file that begins so is, and what to do; None if that is not known. start: its first START_BYTES."""
    if b"<svg" in start:
        return "an SVG drawing, which has no pixels of its own", "export it as PNG"
    if start[4:8] == b"ftyp":
        if start[8:12].strip() in _PHOTOS:
            return "a HEIC, AVIF or raw photo, which this Pillow cannot read", _EXPORT
        return "a video", "save one of its frames as PNG"
    if start[4:9] == b"\0\0\0\0{":
        return "a file of weights", "name a picture"
    known = next((kind for magic, kind in _KINDS.items() if start.startswith(magic)), None)
    return known or foreign_kind(start)
