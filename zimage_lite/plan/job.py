"""What is to be drawn, in the numbers that memory and time depend on. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ..adapters.joined import AdapterSet
from ..config import MOST_PER_ROUND, PATCH_SIZE, SEQUENCE_MULTIPLE, TOKENS_PER_PASS, VAE_FACTOR, ControlConfig
from ..convert.catalog import Part
from ..units import round_up
from .tiles import Tile, tiles_of

LONG_PROMPT_TOKENS = 128

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class ControlSizes:
    """A ControlNet beside the transformer. config: as it is drawn with, see `controlnet.unrolled`; parts: its tensors,
    by their names in it. copies: diffusers' mathematics, which keeps a copy of the residual stream; that it runs the
    noise refiner once more is left out of times."""

    config: ControlConfig
    parts: tuple[Part, ...]
    copies: bool = False

    @property
    def blocks(self) -> int:
        return self.config.n_refiner_layers + len(self.config.control_layers_places)


@dataclass(frozen=True)
class SeenShape:
    """A reference. size: width and height in pixels; grid: rows and columns of patches, as the vision tower sees it."""

    size: tuple[int, int]
    grid: tuple[int, int]

    @property
    def latents(self) -> int:
        """Pixels of its latent."""
        return self.size[0] * self.size[1] // VAE_FACTOR**2

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Job:
    """What is to be drawn: `images` of one size. prompt_tokens: of each text that is encoded, what to steer away from
    included; other_tokens: of prompts of other jobs, whose embeddings wait meanwhile. adapters: sets of LoRAs and their
    kin, one after another, and shares: how many images each has.
    pictures: how many different ones of that size are encoded; over: drawn over one; held_bytes: of pictures that wait
    in RAM; open_bytes: of the one that is read at a time, back_bytes: that an image is put back into.
    evaluations: of the model for each image, if not one a step. controls: ControlNets; asked: of each pass of an image,
    whether they run in it, empty: in all; contexts: channels of all latents that they see in a round.
    references: that each image sees, and looks: how many different ones there are in a round; then prompt_tokens are
    those of whole captions, padded."""

    width: int
    height: int
    steps: int = 8
    guided: bool = False
    images: int = 1
    prompt_tokens: tuple[int, ...] = (LONG_PROMPT_TOKENS,)
    other_tokens: int = 0
    pictures: int = 0
    adapters: tuple[AdapterSet, ...] = field(default=(), compare=False)
    shares: tuple[int, ...] = ()
    evaluations: int | None = None
    over: bool = False
    held_bytes: int = 0
    open_bytes: int = 0
    back_bytes: int = 0
    controls: tuple[ControlSizes, ...] = field(default=(), compare=False)
    asked: tuple[bool, ...] = ()
    contexts: int = 0
    references: tuple[SeenShape, ...] = ()
    looks: int = 0

    @property
    def passes(self) -> int:
        """Over the transformer, for each image."""
        return (self.steps if self.evaluations is None else self.evaluations) * len(self.tiles)

    def batches(self, most: int) -> int:
        """Of so many images at once, which have the same adapters."""
        return sum(-(-share // most) for share in self.shares or (self.images,))

    @property
    def tiles(self) -> list[Tile]:
        """What the transformer sees at a time. From noise, each would become a picture of its own."""
        whole = [Tile(0, 0, self.height // VAE_FACTOR, self.width // VAE_FACTOR)]
        return tiles_of(self.width, self.height) if self.over else whole

    @property
    def pixels(self) -> int:
        return self.width * self.height

    @property
    def latents(self) -> int:
        """Pixels of the latent image."""
        return self.pixels // VAE_FACTOR**2

    @property
    def image_tokens(self) -> int:
        """That the transformer sees at a time."""
        tile = self.tiles[0]
        return padded(tile.height * tile.width // PATCH_SIZE**2)

    @property
    def seen_tokens(self) -> int:
        """Of references' latents, beside each image."""
        return sum(padded(shape.latents // PATCH_SIZE**2) for shape in self.references)

    @property
    def look_tokens(self) -> int:
        """Of references' features, and of what stands in the place of the image's, beside each caption."""
        return sum(padded(shape.patches) for shape in self.references) + SEQUENCE_MULTIPLE * bool(self.references)

    @property
    def round_images(self) -> int:
        """At most, in a round."""
        return min(self.images, MOST_PER_ROUND)

    @property
    def round_tokens(self) -> tuple[int, ...]:
        """Of the prompts of a round, at most."""
        return tuple(sorted(self.prompt_tokens)[-self.round_images * (2 if self.guided else 1) :])


def reference_jobs(job: Job) -> dict[tuple[int, int], Job]:
    """Encoding references, of each size."""
    sizes = dict.fromkeys(shape.size for shape in job.references)
    return {size: replace(job, width=size[0], height=size[1], pictures=job.looks) for size in sizes}


def batched(items: Iterable[_Item], tokens: Callable[[_Item], int]) -> list[list[_Item]]:
    """Prompts as they are encoded and refined, in order: together while they have at most TOKENS_PER_PASS."""
    found, held = list[list[_Item]](), 0
    for item in items:
        held += tokens(item)
        if not found or held > TOKENS_PER_PASS:
            found.append([])
            held = tokens(item)
        found[-1].append(item)
    return found


def padded(tokens: int) -> int:
    """Of a prompt or an image, as the transformer sees them."""
    return round_up(tokens, SEQUENCE_MULTIPLE)
