"""What ControlNets see of an image: latents of the picture to follow, and of what is kept where a mask repaints."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import VAE_FACTOR, ControlConfig, GenerateOptions, known_by
from ..pictures.controls import MAKERS, MAKING_BYTES
from ..pictures.fitting import fitted
from ..pictures.masks import nearest_latent_mask, with_grey_holes
from ..pictures.reading import read
from .sketch import OPEN_COPIES, Sketch

_Size = tuple[int, int]


@dataclass(frozen=True)
class SeenPicture:
    """One that is encoded for a ControlNet. key: equal for the same; source_bytes: that it takes while it is open."""

    key: Hashable
    opened: Callable[[], np.ndarray]
    source_bytes: int
    latent: Tensor | None = None

    def given(self) -> Tensor:
        """[height, width, 3] uint8, or float32 where a grey hole lies between two values."""
        return torch.from_numpy(self.opened())

    def noise(self) -> None:
        """The likeliest latent is taken."""


@dataclass(frozen=True)
class Sight:
    """What one ControlNet sees. size: width and height of the image; followed, kept: pictures, if there are any; mask:
    opens it, where there is one."""

    channels: int
    size: _Size
    followed: SeenPicture | None
    kept: SeenPicture | None
    mask: Callable[[], np.ndarray | None] | None = None

    @property
    def pictures(self) -> list[SeenPicture]:
        return [picture for picture in (self.followed, self.kept) if picture is not None]

    @property
    def key(self) -> Hashable:
        return (self.channels, self.size, *(picture and picture.key for picture in (self.followed, self.kept)))

    def context(self, latents: Mapping[Hashable, Tensor]) -> Tensor:
        """latents: of the pictures, by their keys. -> [channels, height/8, width/8] float32: 16 of the picture to
        follow, one that is 1 where pixels are kept, 16 of those; zeros for what there is not, as in the training."""
        width, height = (side // VAE_FACTOR for side in self.size)
        found = torch.zeros(self.channels, height, width)
        if self.followed:
            latent = latents[self.followed.key]
            found[: len(latent)] = latent
        if self.kept and self.mask:
            latent, mask = latents[self.kept.key], self.mask()
            assert mask is not None
            found[-len(latent) :] = latent
            found[-len(latent) - 1] = 1 - torch.from_numpy(nearest_latent_mask(mask))
        return found


def sights_of(
    request: GenerateOptions, size: _Size, sketch: Sketch | None, configs: Sequence[ControlConfig],
    known: dict[Hashable, Any],
) -> tuple[Sight, ...]:  # fmt: skip
    """Of each ControlNet. size: width and height of the image; sketch: what it is made from; known: pictures that were
    looked at before. Raises UserError."""
    found = []
    for (source, made), config in zip(request.followed, configs, strict=True):
        followed = None if source is None else _followed(request, source, made, size, sketch, known)
        repaints = config.inpaints and sketch is not None and sketch.masked
        kept = _kept(sketch) if repaints and sketch is not None else None
        found.append(Sight(config.control_in_dim, size, followed, kept, sketch.mask if sketch and kept else None))
    return tuple(found)


def _followed(
    request: GenerateOptions, source: Any, made: str, size: _Size, sketch: Sketch | None, known: dict[Hashable, Any]
) -> SeenPicture:
    fit = "stretch" if request.control_math == "diffusers" else request.fit
    beside = sketch if sketch and sketch.opened else None
    key = known_by(source), made, size, fit, beside and beside.shape_key
    if key not in known:
        n_bytes = OPEN_COPIES * read(source).rgb.nbytes + (beside.source_bytes if beside else 0)
        n_bytes += MAKING_BYTES * size[0] * size[1] * (made != "map")
        known[key] = SeenPicture(key, partial(_laid_out, source, made, size, fit, beside), n_bytes)
    return known[key]


def _laid_out(source: Any, made: str, size: _Size, fit: str, beside: Sketch | None) -> np.ndarray:
    """[height, width, 3] uint8, of the image's size, and as the picture beside it lies there."""
    rgb = read(source).on(0 if made == "map" else 255)
    laid = fitted(rgb, size, fit) if beside is None else beside.canvas().beside(rgb, fit)
    return MAKERS[made](laid)


def _kept(sketch: Sketch) -> SeenPicture:
    def opened() -> np.ndarray:
        canvas = sketch.canvas()
        mask = canvas.given_mask()
        assert mask is not None
        return with_grey_holes(canvas.given(), mask)

    return SeenPicture(("kept", sketch.shape_key), opened, sketch.source_bytes)
