"""The model that ships with the package, and what a model folder's card.json says of itself. Loads no torch."""

from __future__ import annotations

from importlib.resources import files
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from ..config import DEFAULT_SIZE, VaeConfig
from ..errors import FileFormatError
from .json_file import read_json
from .weight_files import WEIGHT_SUFFIXES

DEMO = "demo"  # as a MODEL; a folder of that name is reached as ./demo
CARD = "card.json"


def model_folder(model: str | PathLike[str]) -> Path:
    """The folder that MODEL means."""
    return Path(str(files("zimage_lite") / "demo")) if fspath(model) == DEMO else Path(model)


def control_place(control: str) -> Path:
    """The file or folder that a ControlNet's name means: that of `DEMO` follows edges."""
    return model_folder(DEMO) / "controlnet" / "edges-8steps.safetensors" if control == DEMO else Path(control)


def control_name(control: str) -> str:
    """What a ControlNet is called: as its file without the ending, also on the Hub, or its folder; one made in memory
    as it is named."""
    place = control_place(control)
    is_file = place.is_file() or place.suffix.lower() in WEIGHT_SUFFIXES
    return place.name if place.is_dir() else place.stem if is_file else control


def default_size(folder: Path | None) -> tuple[int, int]:
    """Width and height that the model draws best: what its card says, or those of the true model. Raises UserError."""
    values = _card(folder)
    width = values.get("default_width", DEFAULT_SIZE)
    height = values.get("default_height", DEFAULT_SIZE)
    if not isinstance(width, int) or not isinstance(height, int):
        raise FileFormatError(f"{folder}/{CARD}: default size", got=f"{width} by {height}", expected="whole numbers")
    return width, height


def colour_layers(folder: Path | None) -> list[list[list[float]]] | None:
    """How the colours of a preview follow from the latents, if the card says it: layers, each a row of numbers for
    each output, its bias last. The card has a text for each row. Raises UserError."""
    layers = _card(folder).get("colours")
    if layers is None:
        return None
    try:
        found = [[[float(word) for word in row.split()] for row in rows] for rows in layers]
    except (TypeError, AttributeError, ValueError) as error:
        raise FileFormatError(f"{folder}/{CARD}: colours are not lists of rows of numbers") from error
    width = VaeConfig.latent_channels
    for rows in found:
        if any(len(row) != width + 1 for row in rows):
            raise FileFormatError(f"{folder}/{CARD}: a row of colours", expected=f"{width} weights and a bias")
        width = len(rows)
    if width != 3:
        raise FileFormatError(f"{folder}/{CARD}: colours", got=width, expected="3 in the end")
    return found


def _card(folder: Path | None) -> dict[str, Any]:
    card = folder / CARD if folder else None
    return read_json(card) if card and card.exists() else {}
