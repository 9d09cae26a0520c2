"""The picture that an image is made from, opened only while it is needed: a thousand of them do not lie in memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..config import DEFAULT_STRENGTH, NO_MASK, VAE_FACTOR, GenerateOptions
from ..model.scheduler import initial_noise
from ..pictures.canvas import Canvas, Layout, lay_out
from ..pictures.masks import latent_mask, nearest_latent_mask
from ..pictures.reading import Picture, read
from .latents import read_latents
from .walk import Source

OPEN_COPIES = 8  # of the source's three bytes a pixel, at most, while it is read or put back: measured at 98 MP


@dataclass
class Sketch:
    """A picture, latents, or an image that is still to be drawn.

    size: width and height that the model draws; finished_size: of what comes out; strength: how much of the schedule
    it goes through; seed: of the latent, where it is drawn from what the encoder says, as diffusers does: else the most
    likely one is taken; latent: where there is nothing to encode; key: equal for those of the same latent;
    shape_key: equal for those that are laid out alike; source_bytes: that it takes while it is open; masked: some of it
    stays; regenerates: not even that, as diffusers' ControlNets have it; notes: what of it the user might not expect.
    """

    size: tuple[int, int]
    finished_size: tuple[int, int]
    strength: float
    opened: Callable[[], Canvas] | None = None
    seed: int | None = None
    latent: Tensor | None = None
    channels: int = 16
    key: Hashable = None
    shape_key: Hashable = None
    source_bytes: int = 0
    masked: bool = False
    regenerates: bool = False
    notes: tuple[str, ...] = ()

    def given(self) -> Tensor:
        """What is encoded: [height, width, 3] uint8."""
        return torch.from_numpy(self.canvas().given())

    def canvas(self) -> Canvas:
        """Opened anew each time."""
        assert self.opened is not None
        return self.opened()

    def mask(self) -> np.ndarray | None:
        """[height, width] uint8, what is drawn anew, if there is a mask."""
        return self.canvas().given_mask()

    def noise(self) -> Tensor | None:
        """By which the latent is drawn."""
        width, height = (side // VAE_FACTOR for side in self.size)
        return None if self.seed is None else initial_noise(self.seed, self.channels, height, width)

    def source(self, latent: Tensor) -> Source:
        """latent: what it is encoded to."""
        return Source(latent, self._mask(), self.seed is not None)

    def _mask(self) -> Tensor | None:
        """[height/8, width/8] float32, 1 where the latent may change; None if it may everywhere."""
        mask = None if self.opened is None or self.regenerates else self.mask()
        if mask is None:
            return None
        return torch.from_numpy((latent_mask if self.seed is None else nearest_latent_mask)(mask))

    def finished(self, pixels: Tensor) -> Tensor:
        """[height, width, 3] uint8, as decoded -> put back into the picture."""
        if self.opened is None or self.regenerates:
            return pixels
        return torch.from_numpy(self.canvas().finished(pixels.numpy()))

    def made_from(self, pixels: Tensor) -> None:
        """The image that was to be drawn first, [height, width, 3] uint8."""
        layout = Layout(*self.size, fit="stretch")
        self.opened = partial(lay_out, Picture(pixels.numpy()), None, layout, self.size)


def sketch_of(
    request: GenerateOptions, channels: int, default_size: tuple[int, int], known: dict[Hashable, Sketch]
) -> Sketch | None:
    """None: it is made from nothing. channels: of latents; default_size: width and height that the model draws best;
    known: those that were looked at before, by their keys. Raises UserError."""
    if request.latents is not None:
        latent = read_latents(request.latents, channels, request)
        size = latent.shape[2] * VAE_FACTOR, latent.shape[1] * VAE_FACTOR
        return Sketch(size, size, request.strength or DEFAULT_STRENGTH, latent=latent, key=object())
    if request.image is None:
        return None
    key = tuple(_key(getattr(request, name)) for name in _SHAPING)
    if key not in known:
        opened = partial(_canvas, request, default_size)
        canvas = opened()
        strength = DEFAULT_STRENGTH if canvas.mask is None else 1.0
        n_bytes, notes = OPEN_COPIES * canvas.source.nbytes, tuple(_notes(request, canvas))
        known[key] = Sketch(
            canvas.size, canvas.result_size, strength, opened, None, None, channels, key, key, n_bytes,
            masked=canvas.mask is not None, notes=notes,
        )  # fmt: skip
    sampled = request.strength_mode == "diffusers"
    return replace(
        known[key],
        strength=request.strength or known[key].strength,
        seed=request.seed if sampled else None,
        key=(key, request.seed) if sampled else key,
    )


def _notes(request: GenerateOptions, canvas: Canvas) -> Iterator[str]:
    if canvas.mask is not None and request.mask is None and not request.outpaint:
        share = 100 * float((canvas.mask > 0).mean())
        yield f"{share:.0f} % of the picture is transparent and is drawn anew; --mask none takes it on white"
    (width, height), (left, top, right, bottom) = canvas.scaled, canvas.box
    if request.inpaint_area == "picture" and width < right - left and request.strength_mode == "steps":
        yield (
            f"the picture has {right - left}x{bottom - top} pixels and is drawn at {width}x{height}, which the model "
            "is made for; name a --width for more"
        )


_SHAPING = ("image", "mask", "width", "height", "fit", "inpaint_area", "outpaint", "strength_mode")


def _key(value: object) -> Hashable:
    """Pictures in memory are known by where they are: they live as long as the requests."""
    return value if isinstance(value, str | int | tuple | None) else id(value)


def _canvas(request: GenerateOptions, default_size: tuple[int, int]) -> Canvas:
    layout = Layout(
        request.width,
        request.height,
        request.fit,
        request.outpaint or (0, 0, 0, 0),
        area=request.inpaint_area,
        diffusers=request.strength_mode == "diffusers",
    )
    ignored = isinstance(request.mask, str) and request.mask == NO_MASK
    mask = None if request.mask is None or ignored else read(request.mask)
    return lay_out(read(request.image), mask, layout, default_size, alpha=not ignored)
