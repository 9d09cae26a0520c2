"""JSON files that come with a checkpoint, untrusted like everything else in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import FileFormatError, UserError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: not JSON in UTF-8") from error
    if not isinstance(values, dict):
        raise FileFormatError(f"{path}: not a JSON object")
    return values
