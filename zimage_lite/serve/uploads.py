"""Pictures from clients: as base64 in JSON or as files of a form, never by a URL or a path. Looked at before anything
is decoded."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # whose decoders run no programs and open no files
_DATA_URL = re.compile(r"data:image/[\w.+-]{1,40};base64,")


def picture_of(value: object, name: str, most_pixels: int) -> bytes:
    """value: base64, with "data:image/...;base64," before it or without; name: for messages. Raises UserError."""
    if not isinstance(value, str) or not value:
        raise UserError(name, got=type(value).__name__, expected="a picture in base64")
    found = _DATA_URL.match(value[:80])
    text = value[found.end() :] if found else value
    if not found and re.match(r"[a-zA-Z][\w+.-]{0,20}:", value[:24]):
        raise UserError(f"{name}: URLs are not fetched", expected="a picture in base64, or a data: URL of it")
    try:
        raw = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise UserError(f"{name}: not base64", expected="a picture in base64, or a data: URL of it") from error
    return checked(raw, name, most_pixels)


def size_of(source: bytes | Path, name: str = "the picture") -> tuple[int, int]:
    """Width and height, as its file has them. Raises UserError for what is no picture."""
    with _opened(source, name) as picture:
        return picture.size


def media_type(source: Path) -> str:
    """Such as image/png. Raises UserError for what is no picture."""
    with _opened(source, "the picture") as picture:
        return picture.get_format_mimetype() or "application/octet-stream"


@contextmanager
def _opened(source: bytes | Path, name: str) -> Iterator[ImageFile]:
    """Its header. Raises UserError."""
    from PIL import Image

    from ..pictures.reading import decoding

    with (
        decoding(name),
        Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as picture,
    ):
        yield picture


def checked(raw: bytes, name: str, most_pixels: int) -> bytes:
    """The same bytes, if they begin like a picture that is not too large. Raises UserError."""
    width, height = size_of(raw, name)
    if width * height > most_pixels:
        most = f"at most {most_pixels / 1e6:g} million pixels"
        raise UserError(f"{name}: too large", got=f"{width} x {height}", expected=most)
    return raw


def mask_of_alpha(raw: bytes) -> bytes:
    """As OpenAI has its masks, what is transparent is drawn anew: -> white there, black elsewhere, as PNG."""
    from ..pictures.reading import read

    picture = read(raw, "mask")
    if picture.alpha is None:
        raise UserError("mask: nothing of it is transparent", expected="a PNG that is transparent where to draw")
    return _png(255 - picture.alpha)


def prepared_mask(raw: bytes, invert: bool, blur: float) -> bytes:
    """As A1111 has them: turned round, and blurred by so many pixels. -> PNG."""
    from PIL import Image, ImageFilter

    from ..pictures.reading import read

    white = Image.fromarray(read(raw, "mask").on(0)).convert("L")
    white = Image.eval(white, lambda value: 255 - value) if invert else white
    return _png(white.filter(ImageFilter.GaussianBlur(min(max(blur, 0.0), 64.0))))


def _png(image: object) -> bytes:
    from PIL import Image

    file = BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, format="PNG")  # type: ignore[arg-type]
    return file.getvalue()
