"""Pictures in terminals: what was written is decoded again, by decoders of our own and by Pillow."""

from __future__ import annotations

import io
import os
import re
import sys
import time
from base64 import b64decode

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from zimage_lite.cli import progress, say, terminal_picture
from zimage_lite.cli.terminal_picture import Encode, Screen, TerminalPicture, encoder, iterm2, kitty, sixel, terminal


def smooth(height: int, width: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    across, down = np.linspace(0, 255, width), np.linspace(0, 255, height)
    planes = np.broadcast_arrays(across[None], down[:, None], 128.0)
    return Image.fromarray(np.stack(planes, -1).round().astype(np.uint8))


def noisy(height: int, width: int, seed: int = 1) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# --- Decoders


def from_kitty(text: str) -> tuple[dict[str, str], np.ndarray]:
    """The keys of the first piece, and the picture."""
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text)
    assert "".join(f"\x1b_G{keys};{data}\x1b\\" for keys, data in pieces) == text
    said = [dict(pair.split("=") for pair in keys.split(",")) for keys, _ in pieces]
    assert all(len(data) <= 4096 and len(data) % 4 == 0 for _, data in pieces)
    assert [keys["m"] for keys in said] == ["1"] * (len(pieces) - 1) + ["0"]
    assert all(keys.keys() == {"m"} for keys in said[1:])
    return said[0], np.array(Image.open(io.BytesIO(b64decode("".join(data for _, data in pieces)))))


def from_iterm2(text: str) -> tuple[dict[str, str], np.ndarray]:
    match = re.fullmatch(r"\x1b\]1337;File=([^:]*):([A-Za-z0-9+/=]*)\x07", text)
    assert match
    keys, png = dict(pair.split("=") for pair in match[1].split(";")), b64decode(match[2])
    assert int(keys["size"]) == len(png)
    return keys, np.array(Image.open(io.BytesIO(png)))


def from_sixel(text: str) -> np.ndarray:
    """As a VT340 reads it, and with every pixel painted once."""
    match = re.fullmatch(r'\x1bP0;0q"1;1;(\d+);(\d+)(.*)\x1b\\', text)
    assert match
    width, height = int(match[1]), int(match[2])
    picture, painted = np.zeros((height, width, 3)), np.zeros((height, width), int)
    colours: dict[int, tuple[float, ...]] = {}
    x = y = colour = 0
    tokens = re.findall(r"#\d+(?:;\d+)*|!\d+[?-~]|[?-~]|\$|-", match[3])
    assert "".join(tokens) == match[3]
    for token in tokens:
        if token == "$":
            x = 0
        elif token == "-":
            x, y = 0, y + 6
        elif token[0] == "#":
            colour, *definition = map(int, token[1:].split(";"))
            if definition:
                assert definition[0] == 2 and all(0 <= part <= 100 for part in definition[1:])
                colours[colour] = tuple(255 * part / 100 for part in definition[1:])
        else:
            run = int(token[1:-1]) if token[0] == "!" else 1
            rows = [row for row in range(6) if (ord(token[-1]) - 63) >> row & 1]
            for row in rows:
                picture[y + row, x : x + run] = colours[colour]
                painted[y + row, x : x + run] += 1
            x += run
            assert x <= width
    assert len(colours) <= 256
    assert (painted == 1).all()
    return picture


# --- Encoders


@pytest.mark.parametrize("given", [smooth(8, 8), noisy(96, 128), noisy(1, 1)], ids=["small", "large", "one pixel"])
def test_kitty(given: Image.Image) -> None:
    keys, picture = from_kitty(kitty(given, 12, Screen()))
    assert np.array_equal(picture, given)
    assert (keys["a"], keys["f"], keys["r"], keys["C"], keys["q"]) == ("T", "100", "12", "1", "2")
    assert 0 < int(keys["i"]) < 2**32
    assert from_kitty(kitty(noisy(4, 4), 12, Screen()))[0]["i"] == keys["i"]  # so the next one replaces it


def test_iterm2() -> None:
    given = noisy(64, 96)
    keys, picture = from_iterm2(iterm2(given, 12, Screen()))
    assert np.array_equal(picture, given)
    assert (keys["inline"], keys["height"], keys["preserveAspectRatio"]) == ("1", "12", "1")


@pytest.mark.parametrize("shape", [(8, 8), (64, 96), (50, 20)])
def test_sixel(shape: tuple[int, int]) -> None:
    """256 colours of a picture with thousands, in hundredths: 2 % of white on average."""
    given = smooth(*shape)
    picture = from_sixel(sixel(given, 12, Screen(cell_height=15)))
    assert picture.shape == (180, round(180 * shape[1] / shape[0]), 3)
    wanted = np.array(given.resize(picture.shape[1::-1], Image.Resampling.BILINEAR), float)
    assert np.abs(picture - wanted).mean() < 0.02 * 255


def test_one_colour_is_exact() -> None:
    """To the half hundredth that sixels have."""
    for colour in ((77, 77, 77), (255, 30, 7), (0, 0, 0)):
        text = sixel(Image.new("RGB", (4, 4), colour), 6, Screen())
        assert np.abs(from_sixel(text) - colour).max() <= 255 * 0.005
        assert len(text) < 6000  # runs are counted


# --- Places


class Terminal:
    """As much of one as is needed here: lines of text, pictures, and a cursor. Lines scroll at the bottom."""

    PICTURE = re.compile(r"(?:\x1b_G[^\x1b]*\x1b\\)+|\x1b\]1337;[^\x07]*\x07|\x1bP[^\x1b]*\x1b\\")
    TOKEN = re.compile(PICTURE.pattern + r"|\x1b[78]|\x1b\[\??\d*[A-Za-z]|\r|\n|[^\x1b\r\n]+")

    def __init__(self, height: int = 24) -> None:
        self.lines, self.height, self.row, self.saved = [""] * height, height, height // 2, 0
        self.pictures: list[int] = []  # the rows of their upper edges
        self.at_start = True

    def write(self, text: str) -> None:
        tokens = self.TOKEN.findall(text)
        assert "".join(tokens) == text
        for token in tokens:
            self.take(token)

    def take(self, token: str) -> None:
        if self.PICTURE.fullmatch(token):
            self.pictures.append(self.row)
        elif token == "\x1b7":
            self.saved = self.row
        elif token == "\x1b8":
            self.row = self.saved
        elif match := re.fullmatch(r"\x1b\[(\d*)A", token):
            assert self.row >= int(match[1] or 1), "above the screen"
            self.row -= int(match[1] or 1)
        elif token == "\x1b[2K":
            self.lines[self.row] = ""
        elif token == "\n":
            self.row += 1
            if self.row == self.height:
                self.row -= 1
                self.lines = [*self.lines[1:], ""]
                self.pictures = [row - 1 for row in self.pictures]
        elif token[0] not in "\x1b\r":
            self.lines[self.row] += token


@pytest.mark.slow
@pytest.mark.parametrize("encode", [kitty, iterm2, sixel])
def test_each_takes_the_place_of_the_one_before(encode: Encode) -> None:
    picture, terminal = TerminalPicture(encode, Screen(80, 24)), Terminal()
    for seed in range(3):
        terminal.write(picture.text(noisy(32, 32, seed)))
    assert terminal.pictures == [terminal.row - 16] * 3
    terminal.write(picture.text(noisy(32, 64)))  # of another shape
    *others, last = terminal.pictures
    assert last == terminal.row - 16 and others == [last - 16] * 3


@pytest.mark.parametrize(
    ("screen", "shape", "rows"),
    [
        (Screen(80, 24), (64, 64), 16),
        (Screen(80, 60), (64, 64), 16),
        (Screen(80, 14), (64, 64), 6),
        (Screen(80, 24), (32, 160), 8),  # 8 rows are as high as 16 columns are wide, and it is 5 times as wide
        (Screen(80, 24), (2, 1000), 1),
        (Screen(80, 5), (64, 64), 1),
    ],
)
def test_it_fits(screen: Screen, shape: tuple[int, int], rows: int) -> None:
    text = TerminalPicture(kitty, screen).text(noisy(*shape))
    assert text.startswith("\r" + "\n" * rows + f"\x1b7\x1b[{rows}A")
    assert f",r={rows}," in text


def test_above_progress_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """What rich writes between is its own business, as long as the bars stay below the picture. After a line below a
    picture, which is what a finished image leaves, the next has a place of its own."""
    stderr = Console(file=io.StringIO(), force_terminal=True, width=60, height=24, legacy_windows=False)
    stderr.push_render_hook(progress.TEXTS)
    for module in (progress, terminal_picture):
        monkeypatch.setattr(module, "console", lambda: stderr)
    picture, screen = TerminalPicture(kitty, Screen(60, 24)), Terminal(60)
    with progress.phase_progress() as tell:
        tell("encode", 1, 1)
        for step in range(3):
            picture.show(noisy(16, 16, step))
            tell("denoise", step + 1, 3)
            time.sleep(0.15)  # the bars are drawn anew every 0.1 s
        say("image-1.png")
        for step in range(2):
            picture.show(noisy(16, 16, step))
        time.sleep(0.15)
        screen.write(re.sub(r"\x1b\[[\d;]*m|\x1b\[\?25[lh]", "", stderr.file.getvalue()))
    first, second = screen.pictures[0], screen.pictures[3]
    assert screen.pictures == [first] * 3 + [second] * 2
    assert second == first + 17
    assert screen.lines[first + 16] == "image-1.png"
    assert [line.split()[0] for line in screen.lines[second + 16 :] if line] == ["encode", "denoise", "decode"]
    assert not "".join(screen.lines[:first]) and not "".join(screen.lines[second : second + 16])


# --- Which terminal


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"TERM": "xterm-kitty", "KITTY_WINDOW_ID": "1"}, kitty),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, kitty),
        ({"TERM": "xterm-ghostty", "TERM_PROGRAM": "ghostty"}, kitty),
        ({"TERM": "xterm-kitty"}, kitty),  # through ssh
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, iterm2),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, iterm2),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, iterm2),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm", "KITTY_WINDOW_ID": "1"}, iterm2),  # started from kitty
        ({"TERM": "foot"}, sixel),
        ({"TERM": "foot", "KITTY_WINDOW_ID": "1"}, sixel),
        ({"TERM": "mlterm"}, sixel),
        ({"WT_SESSION": "0a1b"}, sixel),
        ({"TERM": "xterm-256color", "WT_SESSION": "0a1b"}, sixel),  # WSL
        ({"TERM": "xterm", "TERM_PROGRAM": "mintty"}, sixel),
        ({"TERM": "xterm-256color", "KONSOLE_VERSION": "230804"}, sixel),
        ({"TERM": "xterm-256color"}, None),
        ({}, None),
        ({"TERM": "dumb"}, None),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "vscode", "WT_SESSION": "0a1b", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "Apple_Terminal"}, None),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux-0/default,1,0"}, None),
        ({"TERM": "screen-256color", "LC_TERMINAL": "iTerm2"}, None),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "foot", "ZELLIJ": "0"}, None),
    ],
)
def test_which_terminal(environment: dict[str, str], wanted: Encode | None) -> None:
    assert encoder(environment) is wanted


def test_not_into_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-kitty")
    monkeypatch.delenv("TMUX", raising=False)
    monkeypatch.setattr(terminal_picture, "console", lambda: Console(file=io.StringIO(), force_terminal=True))
    assert terminal() is None


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudoterminals")
@pytest.mark.parametrize(("pixels", "cell"), [((800, 720), 30), ((0, 0), 20)])
def test_in_a_terminal(monkeypatch: pytest.MonkeyPatch, pixels: tuple[int, int], cell: int) -> None:
    import fcntl
    import struct
    import termios

    for name in ("TMUX", "STY", "ZELLIJ", "TERM_PROGRAM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "foot")
    controller, side = os.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, *pixels))
    with open(side, "w") as file:
        monkeypatch.setattr(terminal_picture, "console", lambda: Console(file=file, width=80, height=24))
        found = terminal()
    os.close(controller)
    assert found and found.encode is sixel
    assert found.screen == Screen(80, 24, cell)
