"""What a ControlNet's file says only between the lines: blocks that were never trained, how its authors run it, what it
goes with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config import ControlConfig, TransformerConfig
from ..errors import UserError, WrongModelError
from .stored import StoredTensor

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

NAMES_KEY = "zimage_lite.names"  # metadata of the files we write: what the source was called
_REFINER = "control_noise_refiner."


def without_untrained(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Some files of 2.0 carry a refiner that it does not use: its projections are as they were before training."""
    projection = tensors.get(f"{_REFINER}0.after_proj.weight")
    if projection is None or not _starts_with_zeros(projection):
        return dict(tensors)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_REFINER)}


def _starts_with_zeros(tensor: StoredTensor) -> bool:
    """In the first row, or as many as have to be read together; where only the header is there so far, it has none."""
    try:
        return not tensor.read(0, tensor.piece_rows(1)).dequantize().any()
    except UserError:
        return False


def names_of(checkpoint: Checkpoint) -> str:
    """All that it is called, one after another: its file or its folder, what lies there, and what it was made of."""
    names = [checkpoint.source.name, *(path.name for path in checkpoint.stamps), checkpoint.metadata.get(NAMES_KEY)]
    return " ".join(dict.fromkeys(name for name in names if name and isinstance(name, str)))


@dataclass(frozen=True)
class Settings:
    """What its authors draw with. base: it is for Z-Image Base, not for Turbo; scales: of hints, from and to; scale: of
    their examples."""

    base: bool
    steps: int
    scales: tuple[float, float]
    scale: float


def settings(config: ControlConfig, names: str) -> Settings:
    """Versions, steps and models differ in what they were trained for, of which only the file's name tells. names: as
    of `names_of`."""
    name = names.lower()
    base, tile, few = "z-image-fun" in name, "tile" in name, "8steps" in name
    if config.version == "1.0":
        return Settings(base, 9, (0.65, 0.8), 0.75)
    scale = 0.85 if tile else 0.75 if config.version.startswith("2.0") else 0.9
    if base:
        return Settings(base, 20 if tile else 25, (0.65, 1.0), scale)
    return Settings(base, 8 if few else 25, (0.65, 1.0), scale)


def said_of(config: ControlConfig, names: str) -> str:
    """For people, in one line. names: as of `names_of`."""
    found = settings(config, names)
    takes = "a picture to follow" + (", a mask and the picture to change" if config.inpaints else "")
    low, high = found.scales
    model, count = "Base" if found.base else "Turbo", len(config.control_layers_places)
    return (
        f"version {config.version}, {count} block{'s' * (count > 1)}; takes {takes}; by its name made for "
        f"{model} in {found.steps} steps, at a scale of {low:.2f} to {high:.2f}"
    )


def require_goes_with(config: ControlConfig, transformer: TransformerConfig, where: str) -> None:
    """Raise WrongModelError unless every hint has its place in the transformer. where: for messages, the file."""
    last = config.control_layers_places[-1]
    refined = config.control_refiner_layers_places[-1] if config.add_control_noise_refiner else 0
    layers, refiners = transformer.n_layers, transformer.n_refiner_layers
    for what, got, fits, expected in (
        ("width", config.dim, config.dim == transformer.dim, transformer.dim),
        ("number of heads", config.n_heads, config.n_heads == transformer.n_heads, transformer.n_heads),
        ("last place among the layers", last, last < layers, f"less than {layers}"),
        ("last place in the noise refiner", refined, refined < refiners, f"less than {refiners}"),
    ):
        if not fits:
            raise WrongModelError(
                f"{where}: {what} of the ControlNet", got=got, expected=f"{expected}, as the transformer has"
            )
