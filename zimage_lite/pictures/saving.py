"""Picture files that carry what it takes to draw them again: PNG in text chunks, JPEG and WebP in EXIF."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.output import replacing
from ..errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# Suffix -> Pillow's format, and how it is saved: at a quality at which no edge shows, colours as sharp as brightness.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"quality": 95}),
}
_EXIF_IFD, _USER_COMMENT, _UNICODE = 0x8769, 0x9286, b"UNICODE\0"  # what follows the last is UTF-16
_COMMENT_BYTES = 60_000  # all of EXIF stands in one segment of a JPEG, at most 65,533 bytes


def require_kind(path: Path) -> None:
    """Raise UserError unless the name says which kind of file to write."""
    if path.suffix.lower() not in KINDS:
        raise UserError("-o", got=str(path), expected=f"a name that ends in {', '.join(KINDS)}")


def save(path: Path, pixels: Tensor, recipe: Mapping[str, Any]) -> None:
    """pixels: [height, width, 3] uint8; recipe: names and values, kept as text in a PNG and as JSON elsewhere."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    kind, options = KINDS[path.suffix.lower()]
    if kind == "PNG":
        info = PngInfo()
        for key, value in recipe.items():
            info.add_itxt(key, str(value))
        options = {"pnginfo": info}
    else:
        exif = Image.Exif()
        exif[_EXIF_IFD] = {_USER_COMMENT: _comment(recipe)}  # Pillow before 11.1 forgets what get_ifd is given
        options = {**options, "exif": exif}
    with replacing(path) as partial:
        Image.fromarray(pixels.numpy()).save(partial, format=kind, **options)


def _comment(recipe: Mapping[str, Any]) -> bytes:
    """A JPEG has no room for more: the longest text is cut, far behind what the model reads of a prompt."""
    while len(text := json.dumps(dict(recipe), ensure_ascii=False).encode("utf-16-be")) > _COMMENT_BYTES:
        longest = max(recipe, key=lambda name: len(str(recipe[name])))
        recipe = {**recipe, longest: str(recipe[longest])[: len(str(recipe[longest])) * 3 // 4]}
    return _UNICODE + text


def recipe_of(path: Path) -> dict[str, Any]:
    """What a picture says of itself; {} if it says nothing that is ours."""
    from PIL import Image

    with Image.open(path) as picture:
        if picture.format == "PNG":
            return dict(picture.text)
        comment = picture.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT, b"")
    if not isinstance(comment, bytes) or not comment.startswith(_UNICODE):
        return {}
    return json.loads(comment.removeprefix(_UNICODE).decode("utf-16-be"))
