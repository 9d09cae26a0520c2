"""ICC profiles made from the numbers that define them, version 2 of the specification: a display's, a scanner's grey
and a printer's."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np

D50 = (0.9642, 1.0, 0.8249)
# Columns: the primaries as XYZ under D50.
ADOBE_RGB = ((0.60974, 0.20528, 0.14919), (0.31111, 0.62567, 0.06322), (0.01947, 0.06087, 0.74457))
DISPLAY_P3 = ((0.51512, 0.29198, 0.15710), (0.24120, 0.69225, 0.06657), (-0.00105, 0.04189, 0.78407))
SRGB = ((0.43607, 0.38515, 0.14307), (0.22249, 0.71687, 0.06061), (0.01392, 0.09708, 0.71410))


def rgb_profile(primaries: tuple[tuple[float, ...], ...], gamma: float) -> bytes:
    tags = {
        f"{colour}XYZ": _xyz(tuple(column)) for colour, column in zip("rgb", zip(*primaries, strict=True), strict=True)
    }
    curves = {f"{colour}TRC": _curve(gamma) for colour in "rgb"}
    return _profile("mntr", "RGB ", "XYZ ", {"wtpt": _xyz(D50), **tags, **curves})


def grey_profile(gamma: float) -> bytes:
    return _profile("mntr", "GRAY", "XYZ ", {"wtpt": _xyz(D50), "kTRC": _curve(gamma)})


def cmyk_profile() -> bytes:
    """Of a printer with poor inks: no two of its corners look as four plain subtractions would."""
    corners = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), -1).reshape(16, 4)
    ink = np.array([[-90, -40, -45], [-90, 80, -5], [-20, -5, 95], [-200, 0, 0]])
    lab = np.array([245, 128, 128]) + corners @ ink
    straight = np.tile(np.arange(256, dtype=np.uint8), 7).tobytes()  # tables of four inputs and of three outputs
    cells = lab.clip(0, 255).astype(np.uint8).tobytes()
    matrix = struct.pack(">9i", *(65536 if index % 4 == 0 else 0 for index in range(9)))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + straight[: 4 * 256] + cells + straight[: 3 * 256]
    return _profile("prtr", "CMYK", "Lab ", {"wtpt": _xyz(D50), "A2B0": table})


def _profile(kind: str, space: str, between: str, tags: Mapping[str, bytes]) -> bytes:
    tags = {"desc": _described("made for a test"), "cprt": b"text" + bytes(4) + b"none\0", **tags}
    directory, body = struct.pack(">I", len(tags)), b""
    first = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        directory += struct.pack(">4sII", name.encode(), first + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = struct.pack(
        ">I4sI4s4s4s", first + len(body), bytes(4), 0x02400000, *map(str.encode, (kind, space, between))
    )
    header += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _fixed(D50)
    return header.ljust(128, b"\0") + directory + body


def _fixed(numbers: tuple[float, ...]) -> bytes:
    return struct.pack(f">{len(numbers)}i", *(round(number * 65536) for number in numbers))


def _xyz(numbers: tuple[float, ...]) -> bytes:
    return b"XYZ " + bytes(4) + _fixed(numbers)


def _curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def _described(text: str) -> bytes:
    return b"desc" + bytes(4) + struct.pack(">I", len(text) + 1) + text.encode() + b"\0" + bytes(11 + 67)
