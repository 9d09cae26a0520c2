"""What an Omni sees of pictures beside the prompt, and what it is told of them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.model_files import ModelFiles
from ..config import GenerateOptions, known_by
from ..errors import UserError
from ..memory.hardware import Hardware
from ..model.omni import Seen, Told
from ..pictures import references as layout
from ..pictures.reading import read
from ..plan.job import SeenShape
from .sketch import OPEN_COPIES
from .words import Segment, Words


@dataclass(frozen=True)
class Reference:
    """A picture, opened only while it is needed. key: equal for those that are seen alike; pixels: that it has if it is
    large; patch: side of the vision tower's patches; source_bytes: that it takes while it is open."""

    source: Any
    key: Hashable
    pixels: int
    patch: int
    shape: SeenShape
    source_bytes: int

    def given(self) -> Tensor:
        """What the VAE encodes: [height, width, 3] uint8."""
        return torch.from_numpy(layout.middle(self._seen()).copy())

    def patches(self) -> Tensor:
        """What the vision tower sees: [rows * columns, patch_dim] float32."""
        return torch.from_numpy(layout.patches(self._seen(), self.shape.grid, self.patch))

    def _seen(self) -> Any:
        return layout.seen(read(self.source).on(255), self.pixels)


def references_of(request: GenerateOptions, patch: int, known: dict[Hashable, Reference]) -> tuple[Reference, ...]:
    """known: those that were looked at before. Raises UserError."""
    named = request.width is not None and request.height is not None
    pixels = request.width * request.height if named else layout.MOST_PIXELS  # type: ignore[operator]
    found = []
    for source in request.references or ():
        key = known_by(source), pixels
        if key not in known:
            picture = read(source)
            layout.require_usable(picture.size, picture.name)
            size = layout.seen_size(picture.size, pixels)
            shape = SeenShape(layout.encoded_size(size), layout.grid_of(size, patch))
            known[key] = Reference(source, key, pixels, patch, shape, OPEN_COPIES * picture.rgb.nbytes)
        found.append(known[key])
    return tuple(found)


def require_seeing(model: ModelFiles, requests: Sequence[GenerateOptions]) -> None:
    """Raise UserError for requests that are not for this model."""
    if any(request.references for request in requests):
        if not model.sees:
            raise UserError(
                f"{model.name} sees no pictures beside the prompt, so it takes no --reference",
                expected="Z-Image Omni or Edit",
                fix="use --image to draw over a picture, or --control with a ControlNet",
            )
        if model.siglip is None:
            raise UserError(
                f"{model.name} has no vision tower, so it takes no --reference",
                fix="name SigLIP2's (so400m, patch16, naflex) with --siglip FILE",
            )
    if model.sees and any(request.controls for request in requests):
        raise UserError(f"{model.name}: there are no ControlNets for Omni", fix="leave out --control")


def told(
    words: Words, embeddings: Mapping[str | Segment, Tensor], references: Sequence[Seen], hardware: Hardware
) -> Tensor | Told:
    """What captions are refined of, on the device. references: as they were encoded, float32 on the CPU."""
    segments = [words.told(embeddings[prompt]).to(hardware.device) for prompt in words.prompts]
    if not references:
        return segments[0]
    there = hardware.device, hardware.dtype
    seen = [Seen(one.latent.to(*there), one.features.to(*there)) for one in references]
    return Told(segments, seen, words.aligned)
