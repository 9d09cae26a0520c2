"""Pictures as people have them -> pixels: upright, in sRGB, 8 bits a colour; of animations the first frame.

Whatever is wrong with a file is one line. The size is known, and refused, before anything is decoded. Memory: 8 bytes a
pixel, which is 0.8 GB for the largest, and what a decoder keeps: 8 more for WebP, 12 for JPEG 2000 (measured).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..checkpoint.impostors import START_BYTES, no_such
from ..errors import FileFormatError, UserError
from .colours import converted, from_array
from .masks import blend
from .strangers import kind_of

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS = 100_000_000  # 10,000 x 10,000
_ORIENTATION = 0x0112  # of EXIF
_UNKNOWN = "not a picture of a kind that can be read", "save it as PNG or JPEG"

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else what it logs of broken files lands on stderr


@dataclass(frozen=True, eq=False)
class Picture:
    """rgb: [h, w, 3] uint8, sRGB; alpha: [h, w] uint8, 255 being opaque, or None if all is; name: for messages."""

    rgb: np.ndarray
    alpha: np.ndarray | None = None
    name: str = "the picture"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.rgb.shape[1], self.rgb.shape[0]

    def on(self, grey: int) -> np.ndarray:
        """Its colours on a plain ground, 0 (black) to 255: [h, w, 3] uint8."""
        return self.rgb if self.alpha is None else blend(np.full_like(self.rgb, grey), self.rgb, self.alpha)


def read(source: str | Path | bytes | Image.Image | np.ndarray | Tensor, name: str = "") -> Picture:
    """A file by its path or its bytes, a picture of Pillow's, or an array or a tensor [h, w, 3] of uint8, or of floats
    from 0 to 1. name: what messages call it. Raises UserError for what is no picture, is broken, or is too large."""
    if isinstance(source, str | Path):
        with file_of(source, name or str(source)) as file:
            return _from_stream(file, name or str(source))
    name = name or "the picture"
    if isinstance(source, bytes):
        return _from_stream(BytesIO(source), name)
    if isinstance(source, Image.Image):
        return _from_pillow(source, name)
    if hasattr(source, "detach"):
        source = source.detach().cpu()
        source = source.float() if source.is_floating_point() else source  # NumPy has no bfloat16
    array = np.asarray(source)
    if array.ndim > 1:
        _require_size(array.shape[1::-1], name)
    return Picture(*from_array(array, name), name)


def require_picture(path: str | Path) -> None:
    """Raise UserError for a file that is no picture, or is too large, by its first bytes: nothing is decoded."""
    with file_of(path, str(path)) as file:
        _require_size(_opened(file, str(path)).size, str(path))


@contextmanager
def file_of(path: str | Path, name: str) -> Iterator[IO[bytes]]:
    """Opened. Raises UserError for what is no file, or cannot be read. name: for messages."""
    if isinstance(path, str) and not path.strip():
        raise UserError("a picture without a name", expected="a file")
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{name}: this is a folder", fix="name a picture in it")
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError as error:
        raise no_such(path, "no such file") from error
    except (OSError, ValueError) as error:  # the latter for a name with a zero in it
        raise UserError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _from_stream(file: IO[bytes], name: str) -> Picture:
    return _from_pillow(_opened(file, name), name)


def _opened(file: IO[bytes], name: str) -> Image.Image:
    """Its header."""
    with decoding(name):
        try:
            return Image.open(file)
        except OSError as error:  # Pillow takes a few weights files for pictures, and only then finds them broken
            file.seek(0)
            known = kind_of(file.read(START_BYTES))
            if not known and not isinstance(error, UnidentifiedImageError):
                raise
            what, fix = known or _UNKNOWN
            raise FileFormatError(f"{name}: {what}", fix=fix) from error


def _from_pillow(image: Image.Image, name: str) -> Picture:
    """Decodes it, if that is still to be done: only here its pixels take memory."""
    _require_size(image.size, name)
    if image.format == "EPS":  # Pillow would have Ghostscript run it, as a program
        raise UserError(f"{name}: an EPS drawing, which has no pixels of its own", fix="export it as PNG")
    with decoding(name):
        image.load()
        _require_size(image.size, name)  # once more, as icons learn theirs only now
        return Picture(*converted(image, _orientation(image)), name)


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Pillow warns nobody here, and what its decoders raise, all that parsing can run into, becomes one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (UserError, MemoryError):
        raise
    except UnidentifiedImageError as error:  # its message names an object in memory
        raise FileFormatError(f"{name}: {_UNKNOWN[0]}", fix=_UNKNOWN[1]) from error
    except Image.DecompressionBombError as error:
        raise _too_large("more pixels than Pillow takes", name) from error
    except Exception as error:
        why = str(error) or type(error).__name__
        fix = "download or export it again"
        raise FileFormatError(f"{name}: the picture is broken or cut short ({why})", fix=fix) from error


def _orientation(image: Image.Image) -> int:
    """As EXIF counts, of a loaded picture: that of a TIFF is 1 by then."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - EXIF that cannot be parsed, in whatever way, says nothing
        return 1


def _require_size(size: tuple[int, ...], name: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise _too_large(f"{width} x {height} pixels", name)
    if not width * height:
        raise FileFormatError(f"{name}: it has no pixels", got=f"{width} x {height}", expected="1 x 1 or more")


def _too_large(got: str, name: str) -> UserError:
    return UserError(
        f"{name}: too large", got=got, expected=f"at most {MAX_PIXELS // 10**6} million", fix="make it smaller first"
    )
