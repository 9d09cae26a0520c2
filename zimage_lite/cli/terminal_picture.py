"""A small picture in a terminal that can show one, each in the place of the one before.

Three ways are spoken: kitty's, iTerm2's, and sixels, which are older than both. Which one is told by the environment
alone: to ask the terminal would mean to wait for an answer that many never give.
"""

from __future__ import annotations

import io
import os
import re
import sys
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from .progress import TEXTS, console

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

MOST_ROWS = 16
_BESIDES = 8  # lines that stay free for what else is written
_CELL_HEIGHT = 20  # pixels: Windows Terminal's for sixels, whatever its font, and a usual one elsewhere


@dataclass(frozen=True)
class Screen:
    """Size in cells, which are about half as wide as high, and the height of one in pixels."""

    columns: int = 80
    lines: int = 24
    cell_height: int = _CELL_HEIGHT


Encode = Callable[["Image", int, Screen], str]  # -> what shows the picture so many rows high


def kitty(picture: Image, rows: int, screen: Screen) -> str:
    """As a PNG in pieces of 4096 characters, under an id of this process: a new picture takes the old one's place. The
    terminal scales it to the rows, leaves the cursor where it is (C=1) and does not answer (q=2)."""
    data = b64encode(_png(picture)).decode()
    pieces = [data[at : at + 4096] for at in range(0, len(data), 4096)]
    keys = f"a=T,f=100,i={os.getpid()},p=1,r={rows},C=1,q=2,"
    return "".join(
        f"\x1b_G{'' if n else keys}m={int(n + 1 < len(pieces))};{piece}\x1b\\" for n, piece in enumerate(pieces)
    )


def iterm2(picture: Image, rows: int, screen: Screen) -> str:
    """As a PNG, which the terminal scales to the rows."""
    png = _png(picture)
    keys = f"inline=1;size={len(png)};width=auto;height={rows};preserveAspectRatio=1"
    return f"\x1b]1337;File={keys}:{b64encode(png).decode()}\x07"


def sixel(picture: Image, rows: int, screen: Screen) -> str:
    """In pixels, at most 256 colours, in bands of six rows: each colour's pixels of a band in one character a column,
    whose low six bits are the rows; runs as !COUNT; $ goes back to the band's start, - on to the next."""
    import numpy as np
    from PIL.Image import Quantize, Resampling

    height = max(rows * screen.cell_height // 6, 1) * 6
    width = max(round(height * picture.width / picture.height), 1)
    large = picture.convert("RGB").resize((width, height), Resampling.BILINEAR)
    few = large.quantize(256, Quantize.FASTOCTREE)  # 2 ms; the default takes up to 500 for no better a picture
    palette = np.asarray(few.getpalette(), dtype=np.uint8).reshape(-1, 3)
    shares = [";".join(str(round(100 * int(part) / 255)) for part in colour) for colour in palette]
    colours = "".join(f"#{n};2;{share}" for n, share in enumerate(shares))
    bands = [_band(band) for band in np.asarray(few).reshape(-1, 6, width)]
    return f'\x1bP0;0q"1;1;{width};{height}{colours}{"-".join(bands)}\x1b\\'


def _band(colours: np.ndarray) -> str:
    """colours: [6, width], each pixel's number."""
    import numpy as np

    width = colours.shape[1]
    bits = np.full((256, width), ord("?"), np.uint8)  # "?" has none of the six set
    for row, of_row in enumerate(colours):
        bits[of_row, np.arange(width)] += 1 << row
    lines = {colour: bits[colour].tobytes().decode() for colour in np.unique(colours)}
    return "$".join(f"#{colour}{_RUN.sub(_counted, line)}" for colour, line in lines.items())


_RUN = re.compile(r"(.)\1{3,}")  # shorter ones take less as they are


def _counted(run: re.Match[str]) -> str:
    return f"!{len(run[0])}{run[1]}"


def _png(picture: Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


# Multiplexers pass none of it on, and hide which terminal is behind them.
_MULTIPLEXERS = ("TMUX", "STY", "ZELLIJ")
# Who calls itself by name (TERM_PROGRAM) is not to be taken for the terminal that it was started from.
_PROGRAMS: dict[str, Encode] = {"iTerm.app": iterm2, "WezTerm": iterm2, "ghostty": kitty, "mintty": sixel}
_TERMS: dict[str, Encode] = {
    "xterm-kitty": kitty,
    "xterm-ghostty": kitty,
    "wezterm": iterm2,
    "foot": sixel,
    "foot-extra": sixel,
    "mlterm": sixel,
    "contour": sixel,
    "yaft-256color": sixel,
}
_VARIABLES: dict[str, Encode] = {
    "KITTY_WINDOW_ID": kitty,
    "WEZTERM_PANE": iterm2,
    "WT_SESSION": sixel,  # Windows Terminal from 1.22 on; those before swallow it
    "MLTERM": sixel,
    "KONSOLE_VERSION": sixel,  # from 22.04 on, the same
}


def encoder(environment: Mapping[str, str]) -> Encode | None:
    """How to show a picture in the terminal that the environment tells of. None: not at all, or nobody knows."""
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if term.startswith(("screen", "tmux")) or any(environment.get(name) for name in _MULTIPLEXERS):
        return None
    if program or term in _TERMS:
        return _PROGRAMS.get(program) or _TERMS.get(term)
    if environment.get("LC_TERMINAL") == "iTerm2":  # which ssh passes on
        return iterm2
    return next((encode for name, encode in _VARIABLES.items() if environment.get(name)), None)


@dataclass
class TerminalPicture:
    encode: Encode
    screen: Screen = Screen()
    _above: tuple[object, ...] = field(default=(), init=False)  # what is right above the cursor

    def text(self, picture: Image) -> str:
        """What shows the picture: written where the cursor is at the start of a line. It leaves the cursor below the
        picture, where the next one must be written to take its place. One of another size gets its own, and so does
        one before which something was printed."""
        fitting = self.screen.columns * picture.height // (2 * picture.width)
        rows = max(min(MOST_ROWS, self.screen.lines - _BESIDES, fitting), 1)
        above = picture.size, TEXTS.count
        room = "\n" * rows if above != self._above else ""
        self._above = above
        return f"\r{room}\x1b7\x1b[{rows}A{self.encode(picture, rows, self.screen)}\x1b8"

    def show(self, picture: Image) -> None:
        """Above the progress bars, if there are any."""
        from rich.segment import ControlType, Segment, Segments

        no_text: Any = [(ControlType.CURSOR_UP, 0)]  # so that rich neither measures nor wraps it
        console().print(Segments([Segment(self.text(picture), None, no_text)]), end="")


def terminal() -> TerminalPicture | None:
    """stderr's. None where it is no terminal, or none that can show pictures."""
    bars = console()
    encode = encoder(os.environ) if bars.file.isatty() else None  # rich takes FORCE_COLOR for a terminal, too
    return TerminalPicture(encode, Screen(bars.width, bars.height, _cell_height(bars.file))) if encode else None


def _cell_height(file: IO[str]) -> int:
    """What the system knows of the terminal, where it does."""
    if sys.platform == "win32":
        return _CELL_HEIGHT
    import fcntl
    import struct
    import termios

    try:
        raw = fcntl.ioctl(file.fileno(), termios.TIOCGWINSZ, bytes(8))  # lines, columns, width, height
        lines, _, _, height = struct.unpack("HHHH", raw)
    except (OSError, ValueError):
        return _CELL_HEIGHT
    return height // lines if lines and height >= lines else _CELL_HEIGHT
