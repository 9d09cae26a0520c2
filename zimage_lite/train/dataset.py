"""A folder of pictures and what each shows: captions from NAME.txt beside NAME.png, or from one JSON Lines file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import SIZE_MULTIPLE
from ..errors import UserError
from ..pictures.fitting import fitted
from ..pictures.reading import read

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".jp2")
_OF_PICTURE = ("file_name", "image", "image_path", "file")  # as datasets of several trainers spell it
_OF_CAPTION = ("caption", "text", "prompt")


@dataclass(frozen=True)
class Example:
    """A picture and its caption."""

    path: Path
    caption: str

    def pixels(self, resolution: int) -> np.ndarray:
        """[height, width, 3] uint8, transparent places on white, in the size that `bucket` gives it."""
        rgb = read(self.path).on(255)
        return fitted(rgb, bucket((rgb.shape[1], rgb.shape[0]), resolution), "crop")


def bucket(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """Width and height to train at, multiples of 16: nearly the picture's own shape, at most resolution^2 pixels, and
    never enlarged by more than what reaches the next multiple."""
    width, height = size
    scale = min(resolution / math.sqrt(width * height), 1.0)
    found = [max(round(side * scale / SIZE_MULTIPLE), 1) * SIZE_MULTIPLE for side in size]
    while found[0] * found[1] > resolution**2:  # both were rounded up
        longer = found.index(max(found))
        found[longer] -= SIZE_MULTIPLE
    return found[0], found[1]


def examples_in(folder: Path, trigger: str = "") -> list[Example]:
    """In the order of their names. A trigger comes in front of every caption that does not have it, and stands alone
    where there is none. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder", expected="a folder of pictures with captions")
    listed = _listed(folder)
    paths = listed or sorted(path for path in folder.iterdir() if _is_picture(path))
    if not paths:
        raise UserError(f"{folder}: no pictures in it", expected=f"files that end in {', '.join(PICTURES[:4])} ...")
    captions = {path: _with(trigger, listed.get(path) or _beside(path)) for path in paths}
    if missing := [path for path, caption in captions.items() if not caption]:
        raise UserError(
            f"{missing[0]}: no caption, and {len(missing) - 1} more"
            if len(missing) > 1
            else f"{missing[0]}: no caption",
            fix=f"write what it shows to {missing[0].with_suffix('.txt').name}, or name a --trigger for all",
        )
    return [Example(path, caption) for path, caption in captions.items()]


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES and not path.name.startswith("._")  # which macOS leaves about


def fingerprint(examples: Iterable[Example]) -> str:
    """Of all pictures and captions: what a training that goes on must find again."""
    found = hashlib.sha256()
    for example in examples:
        for part in (example.caption.encode(), example.path.read_bytes()):
            found.update(hashlib.sha256(part).digest())
    return found.hexdigest()


def _with(trigger: str, caption: str) -> str:
    if not trigger or trigger.lower() in caption.lower():
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def _beside(path: Path) -> str:
    file = path.with_suffix(".txt")
    if not file.exists():
        return ""
    return " ".join(text_of(file).split())


def _listed(folder: Path) -> dict[Path, str]:
    """From the one JSON Lines file, if there is one."""
    files = sorted(folder.glob("*.jsonl"))
    if len(files) > 1:
        raise UserError(
            f"{folder}: {len(files)} JSON Lines files", got=f"{files[0].name}, {files[1].name}", expected="one"
        )
    found = dict[Path, str]()
    for number, line in enumerate(text_of(files[0]).splitlines() if files else [], start=1):
        if line.strip():
            path, caption = _entry(line, f"{files[0]}, line {number}")
            if not (folder / path).is_file():
                raise UserError(f"{files[0]}, line {number}: no such picture", got=path)
            found[folder / path] = caption
    return found


def _entry(line: str, where: str) -> tuple[str, str]:
    expected = f'an object such as {{"{_OF_PICTURE[0]}": "1.png", "{_OF_CAPTION[0]}": "a red fox"}}'
    try:
        given = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON", expected=expected) from error
    path, caption = (
        _first(given, names) if isinstance(given, Mapping) else None for names in (_OF_PICTURE, _OF_CAPTION)
    )
    if not path:
        raise UserError(where, got=line.strip()[:60], expected=expected)
    return path, " ".join((caption or "").split())


def _first(given: Mapping[str, object], names: Iterable[str]) -> str | None:
    return next((value for name in names if isinstance(value := given.get(name), str)), None)


def text_of(file: Path) -> str:
    """Raises UserError."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not text in UTF-8", fix="save it as UTF-8") from error
