"""How OpenAI's clients want their pictures."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from ..pictures.saving import KINDS, recipe_of
from .fields import FieldError
from .jobs import Picture

_SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
_MOST_PARTIAL = 3


@dataclass(frozen=True)
class Answer:
    """kind: "png", "jpeg" or "webp"; partial: previews that are sent on the way, of a stream."""

    kind: str
    quality: int
    as_url: bool
    stream: bool
    partial: int

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Answer:
        """Raises FieldError."""
        kind = values.get("output_format") or "png"
        if not isinstance(kind, str) or kind not in _SUFFIXES:
            raise FieldError(
                f"output_format: got {kind!r:.40}, expected one of {', '.join(_SUFFIXES)}", "output_format"
            )
        quality, partial = values.get("output_compression"), values.get("partial_images")
        quality, partial = 95 if quality is None else quality, partial or 0
        for name, value, most in (("output_compression", quality, 100), ("partial_images", partial, _MOST_PARTIAL)):
            if not isinstance(value, int | str) or not re.fullmatch(r"\d{1,3}", str(value)) or int(value) > most:
                raise FieldError(f"{name}: got {value!r:.40}, expected a number from 0 to {most}", name)
        stream = values.get("stream") in (True, "true", "True", "1")
        return cls(kind, int(quality), values.get("response_format") == "url", stream, int(partial))

    def facts(self, picture: Picture | None) -> dict[str, Any]:
        size = {"size": f"{picture.width}x{picture.height}"} if picture else {}
        return {"background": "opaque", "output_format": self.kind, "quality": "auto", **size}

    def encoded(self, path: Path) -> bytes:
        """The file as it is, or in the other format with its recipe."""
        if self.kind == "png":
            return path.read_bytes()
        import torch

        from ..pictures.reading import read
        from ..pictures.saving import write

        file, recipe = BytesIO(), recipe_of(path)
        write(file, _SUFFIXES[self.kind], torch.from_numpy(read(path).rgb), recipe, quality=self.quality)
        return file.getvalue()

    def partial_image(self, preview: bytes) -> str:
        """In base64."""
        from PIL import Image

        file = BytesIO()
        Image.open(BytesIO(preview)).save(file, format=KINDS[_SUFFIXES[self.kind]][0])
        return base64.b64encode(file.getvalue()).decode()
