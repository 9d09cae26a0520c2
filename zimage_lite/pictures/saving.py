"""Picture files that carry their recipes, twice: as A1111's text, for all others, and as JSON, for us. In a PNG as two
text chunks; in JPEG and WebP in EXIF, as the user's comment and as the image's history."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..checkpoint.output import replacing
from ..errors import UserError
from . import exif
from .infotext import infotext, settings_of
from .old_recipes import is_old, upgraded

if TYPE_CHECKING:
    from torch import Tensor

# Suffix -> Pillow's format, and how it is saved: at a quality at which no edge shows, colours as sharp as brightness.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"quality": 95}),
}
TEXT, OURS = "parameters", "zimage_lite"  # the chunks of a PNG


def require_kind(path: Path) -> None:
    """Raise UserError unless the name says which kind of file to write."""
    if path.suffix.lower() not in KINDS:
        raise UserError("-o", got=str(path), expected=f"a name that ends in {', '.join(KINDS)}")


def save(path: Path, pixels: Tensor, recipe: Mapping[str, Any]) -> None:
    """pixels: [height, width, 3] uint8; recipe: as `pictures/recipe.py` makes it."""
    with replacing(path) as partial, open(partial, "wb") as file:
        write(file, path.suffix, pixels, recipe)


def save_file(path: Path, file: bytes) -> None:
    """A picture that is a file already, as `write` makes it. Raises UserError."""
    with replacing(path) as partial:
        partial.write_bytes(file)


def write(file: IO[bytes], suffix: str, pixels: Tensor, recipe: Mapping[str, Any], **options: Any) -> None:
    """options: of Pillow, in the place of ours."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    kind, own = KINDS[suffix.lower()]
    if kind == "PNG":
        info = PngInfo()
        info.add_text(TEXT, infotext(recipe))  # Latin-1 if it can be, else UTF-8, as A1111 does it
        info.add_itxt(OURS, json.dumps(dict(recipe), ensure_ascii=False))
        own = {"pnginfo": info}
    else:
        own = {**own, "exif": _exif(recipe)}
    Image.fromarray(pixels.numpy()).save(file, format=kind, **{**own, **options})


def _exif(recipe: Mapping[str, Any]) -> bytes:
    """A JPEG has no room for more: the longest text is cut, far behind what the model reads of a prompt."""
    while len(found := exif.written(f"{OURS}: {json.dumps(dict(recipe))}", infotext(recipe))) > exif.MOST_BYTES:
        texts = {name: value for name, value in recipe.items() if isinstance(value, str)}
        longest = max(texts, key=lambda name: len(texts[name]))
        recipe = {**recipe, longest: texts[longest][: len(texts[longest]) * 3 // 4]}
    return found


def recipe_of(source: Path | bytes) -> dict[str, Any]:
    """What a picture says of itself, as `pictures/recipe.py` writes it; of one by another program, what its A1111 text
    has of that. {} if it says nothing that is known. Decodes no pixels. Raises UserError for what is no picture."""
    ours, text = _said(source)
    try:
        values = json.loads(ours) if ours else {}
    except ValueError:  # cut by another program, or not ours
        values = {}
    if not isinstance(values, dict):
        return {}
    if is_old(values) and not isinstance(values.get("model"), dict):
        return upgraded(values)
    return values or settings_of(text)


def infotext_of(source: Path | bytes) -> str:
    """A1111's text, as it stands there; "" if there is none."""
    return _said(source)[1]


def _said(source: Path | bytes) -> tuple[str, str]:
    """Our JSON, or what an old file says as such, and A1111's text."""
    from PIL import Image

    from .reading import decoding, file_of

    name = str(source) if isinstance(source, Path) else "the picture"
    opening: AbstractContextManager[IO[bytes]]
    opening = file_of(source, name) if isinstance(source, Path) else nullcontext(BytesIO(source))
    with opening as file, decoding(name), Image.open(file) as picture:
        texts = {key: value for key, value in picture.info.items() if isinstance(value, str)}
        history, comment = exif.read(picture.getexif()) if picture.format != "PNG" else ("", "")
    if OURS not in texts and is_old(texts):
        return json.dumps(texts), ""
    if comment.startswith("{"):  # an old one
        return comment, ""
    return texts.get(OURS) or history.removeprefix(f"{OURS}: "), texts.get(TEXT) or comment
