"""The model that ships with the package, and what a model folder's card.json says of itself. Loads no torch."""

from __future__ import annotations

from importlib.resources import files
from os import PathLike, fspath
from pathlib import Path

from ..config import DEFAULT_SIZE
from ..errors import FileFormatError
from .json_file import read_json

DEMO = "demo"  # as a MODEL; a folder of that name is reached as ./demo
CARD = "card.json"


def model_folder(model: str | PathLike[str]) -> Path:
    """The folder that MODEL means."""
    return Path(str(files("zimage_lite") / "demo")) if fspath(model) == DEMO else Path(model)


def default_size(folder: Path | None) -> tuple[int, int]:
    """Width and height that the model draws best: what its card says, or those of the true model. Raises UserError."""
    card = folder / CARD if folder else None
    values = read_json(card) if card and card.exists() else {}
    width = values.get("default_width", DEFAULT_SIZE)
    height = values.get("default_height", DEFAULT_SIZE)
    if not isinstance(width, int) or not isinstance(height, int):
        raise FileFormatError(f"{card}: default size", got=f"{width} by {height}", expected="whole numbers")
    return width, height
