"""One image, as asked for."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Hashable
from dataclasses import InitVar, dataclass, fields
from itertools import pairwise
from operator import index
from pathlib import PurePath
from typing import Any

from ..errors import UserError
from .control import ControlUse
from .limits import (
    CONTROL_MATHS,
    CONTROL_SOURCES,
    FITS,
    INFINITE,
    INPAINT_AREAS,
    MAX_STEPS,
    MOST_REFERENCES,
    RANDOM_SEED,
    REFERENCE_POSITIONS,
    SAMPLERS,
    SCHEDULES,
    SIZE_MULTIPLE,
    STRENGTH_MODES,
)
from .lora import Lora

_SOURCES = ("image", "mask", "latents", "control_image", "references")
_OUTPAINT = "pixels left,above,right,below: 0,0,256,0"


def known_by(source: object) -> Hashable:
    """What tells one picture, mask or latent from another: those in memory, which may change and have no hash, are
    known by where they are."""
    if isinstance(source, tuple):
        return tuple(map(known_by, source))
    return source if isinstance(source, str | PurePath | None) else id(source)


@dataclass(frozen=True)
class GenerateOptions:
    """One image, as asked for. None: what the model says of itself. Equal are those that ask for the same, of the same
    picture.

    seed: -1 draws one. guidance: as diffusers counts, 0 is off; cfg: the same as ComfyUI counts, 1 is off;
    guidance_range: parts of the steps between which it is on. loras: of Lora, or what
    `Lora.of` takes, such as "PATH:STRENGTH"; they add up.
    sigmas: noise levels in the place of schedule, shift and steps. variation: how far the prompt is moved, by the seed,
    in the first fifth of the steps. image, mask: a path, bytes, a PIL image or an array [height, width, 3]; white of
    the mask is drawn anew. outpaint: pixels to add left, above, right and below. hires: the result, so many times as
    large, is drawn over with hires_strength. latents: a file of them, in the place of an image.
    controls: ControlNets, of ControlUse, or what `ControlUse.of` takes, such as "FILE:SCALE"; control_image: the
    pictures that they follow, and control_from: what is made of them first, one for all or one for each;
    control_start, control_end: parts of the steps between which they are asked.
    references: up to three pictures that an Omni sees beside the prompt; an image of no named size gets the last one's.
    reference_positions: where the words between them lie, as diffusers 0.42 has it, or each where it begins.
    """

    prompt: str = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    seed: int = 0
    guidance: float | None = None
    negative: str = ""
    shift: float | None = None
    loras: tuple[Lora, ...] = ()
    sampler: str = "euler"
    schedule: str = "simple"
    sigmas: tuple[float, ...] = ()
    variation: float = 0.0
    guidance_range: tuple[float, float] = (0.0, 1.0)
    cfg_normalization: float = 0.0
    cfg_truncation: float = 1.0
    image: Any = None
    mask: Any = None
    strength: float | None = None
    strength_mode: str = "steps"
    fit: str = "crop"
    inpaint_area: str = "picture"
    outpaint: tuple[int, int, int, int] | None = None
    latents: Any = None
    hires: float | None = None
    hires_strength: float = 0.35
    controls: tuple[ControlUse, ...] = ()
    control_image: Any = None
    control_from: tuple[str, ...] = ("map",)
    control_start: float = 0.0
    control_end: float = 1.0
    control_math: str = "authors"
    references: Any = None
    reference_positions: str = "diffusers"
    cfg: InitVar[float | None] = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GenerateOptions) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[Hashable, ...]:
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        return tuple(known_by(value) if name in _SOURCES else value for name, value in settings.items())

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, once they are known."""
        assert self.width is not None and self.height is not None, "Pipeline.complete fills them in"
        return self.width, self.height

    @property
    def step_count(self) -> int:
        """Steps, once they are known: of the whole schedule, of which a picture to start from may take the end."""
        if self.sigmas:
            return len(self.sigmas) - 1
        assert self.steps is not None, "Pipeline.complete fills it in"
        return self.steps

    def __post_init__(self, cfg: float | None) -> None:
        if cfg is not None:
            object.__setattr__(self, "guidance", self._guidance_of(cfg))
        self._check_choices()
        object.__setattr__(self, "loras", Lora.several(self.loras))
        if self.seed == RANDOM_SEED:
            object.__setattr__(self, "seed", secrets.randbelow(2**32))  # as many as other programs have
        if self.steps is not None and not 1 <= self.steps <= MAX_STEPS:
            raise UserError("--steps", got=self.steps, expected=f"a number from 1 to {MAX_STEPS} (Turbo is made for 8)")
        for flag, pixels in (("--width", self.width), ("--height", self.height)):
            if pixels is None:
                continue
            if pixels < SIZE_MULTIPLE or pixels % SIZE_MULTIPLE:
                below = max(pixels // SIZE_MULTIPLE, 1) * SIZE_MULTIPLE
                near = f"{below} or {below + SIZE_MULTIPLE}" if pixels > SIZE_MULTIPLE else f"{below}"
                raise UserError(flag, got=pixels, expected=f"a multiple of {SIZE_MULTIPLE}, such as {near}")
        if not 0 <= self.seed < 2**63:
            raise UserError("--seed", got=self.seed, expected="a whole number from 0 to 2^63 - 1, or random")
        if self.guidance is not None and not 0 <= self.guidance < INFINITE:
            raise UserError("--guidance", got=self.guidance, expected="0 (off) or more")
        if self.shift is not None and not 0 < self.shift < INFINITE:
            raise UserError("--shift", got=self.shift, expected="more than 0 (Turbo 3, Base 6)")
        self._check_levels()
        self._check_picture()
        self._check_controls()
        self._check_references()

    def _check_choices(self) -> None:
        choices = {
            "sampler": SAMPLERS, "schedule": SCHEDULES, "strength_mode": STRENGTH_MODES, "fit": FITS,
            "inpaint_area": INPAINT_AREAS, "control_math": CONTROL_MATHS, "reference_positions": REFERENCE_POSITIONS,
        }  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(_flag(name), got=repr(getattr(self, name)), expected=f"one of {', '.join(known)}")

    def _check_levels(self) -> None:
        """Noise levels, and when the prompt and its opposite are followed."""
        self._set_numbers("sigmas", "numbers from at most 1, falling to 0: 1,0.9,0.6,0")
        falling = all(a > b for a, b in pairwise(self.sigmas))
        if self.sigmas and not (falling and self.sigmas[0] <= 1 and self.sigmas[-1] == 0 and len(self.sigmas) > 1):
            raise UserError("--sigmas", got=self.sigmas, expected="numbers from at most 1, falling to 0: 1,0.9,0.6,0")
        if not 0 <= self.variation < INFINITE:
            raise UserError("--variation", got=self.variation, expected="0 (off) or more, such as 20")
        self._set_numbers("guidance_range", "two parts of the steps: 0,0.8", 2)
        start, end = self.guidance_range
        if not 0 <= start <= end <= 1:
            raise UserError("--guidance-range", got=f"{start:g},{end:g}", expected="two parts of the steps: 0,0.8")
        for flag, value in (("normalization", self.cfg_normalization), ("truncation", self.cfg_truncation)):
            if not 0 <= value < INFINITE:
                raise UserError(f"--cfg-{flag}", got=value, expected="0 or more")

    def _check_picture(self) -> None:
        for flag, part in (("--strength", self.strength), ("--hires-strength", self.hires_strength)):
            if part is not None and not 0.01 <= part <= 1:
                raise UserError(flag, got=part, expected="a number from 0.01 (little changes) to 1 (all does)")
        if self.hires is not None and not 1 < self.hires <= 8:
            raise UserError("--hires", got=self.hires, expected="more than 1 and at most 8, such as 2x")
        if self.outpaint is not None:
            self._set_numbers("outpaint", _OUTPAINT, 4, index)
            if min(self.outpaint) < 0 or not any(self.outpaint):
                raise UserError("--outpaint", got=self.outpaint, expected=_OUTPAINT)
        given = {"--image": self.image, "--latents": self.latents}
        if all(source is not None for source in given.values()):
            raise UserError("--image and --latents both say what to start from", fix="name one of them")
        needs = {
            "--mask": self.mask is not None,
            "--outpaint": self.outpaint is not None,
            "--inpaint-area mask": self.inpaint_area == "mask",
        }
        if self.image is None and (lost := [flag for flag, asked in needs.items() if asked]):
            raise UserError(f"{lost[0]} without a picture", fix="name one with --image")
        if self.strength is not None and all(source is None for source in given.values()):
            raise UserError("--strength without a picture to start from", fix="name one with --image")
        if self.strength is not None and self.sigmas:
            raise UserError("--strength and --sigmas both say where to start", fix="name one of them")
        if self.hires and self.mask is not None:
            raise UserError("--hires does not go with --mask", fix="draw what the mask names first, then use --image")

    def _check_controls(self) -> None:
        object.__setattr__(self, "controls", ControlUse.several(self.controls))
        given = None if self.control_image is None else _several(self.control_image) or None
        object.__setattr__(self, "control_image", given)
        object.__setattr__(self, "control_from", _several(self.control_from) or ("map",))
        for source in self.control_from:
            if source not in CONTROL_SOURCES:
                raise UserError("--control-from", got=repr(source), expected=f"one of {', '.join(CONTROL_SOURCES)}")
        if not 0 <= self.control_start < self.control_end <= 1:
            got = f"{self.control_start:g} and {self.control_end:g}"
            raise UserError(
                "--control-start and --control-end", got=got, expected="parts of the steps, such as 0 and 0.6"
            )
        if not self.controls:
            if given is not None:
                raise UserError("--control-image without a ControlNet", fix="name one with --control FILE")
            return
        for flag, own in (("--control-image", given or ()), ("--control-from", self.control_from)):
            if len(own) > 1 and len(own) != len(self.controls):
                raise UserError(
                    flag, got=f"{len(own)} times", expected=f"once, or once for each of {len(self.controls)}"
                )
        if given is None and self.image is None:
            raise UserError("--control without a picture to follow", fix="name one with --control-image")
        if self.control_math == "diffusers" and len(self.controls) > 1:
            raise UserError("diffusers has one ControlNet at a time", fix="leave out --control-math diffusers")

    def _check_references(self) -> None:
        given = None if self.references is None else _several(self.references) or None
        object.__setattr__(self, "references", given)
        if given is None:
            return
        if len(given) > MOST_REFERENCES:
            raise UserError("--reference", got=f"{len(given)} times", expected=f"at most {MOST_REFERENCES} times")
        if self.controls:
            raise UserError("--control does not go with --reference", fix="leave out one of them")

    @property
    def followed(self) -> list[tuple[Any, str]]:
        """Of each ControlNet: its picture, None if it has only what is to be repainted, and what is made of it."""
        count = len(self.controls)
        images, sources = self.control_image or (None,), self.control_from
        return list(zip(_each(images, count), _each(sources, count), strict=True))

    def _set_numbers(self, name: str, expected: str, count: int = 0, kind: Callable[[Any], float] = float) -> None:
        """A tuple in the place of any sequence of so many numbers; of any length if count is 0."""
        given = getattr(self, name)
        try:
            numbers = tuple(map(kind, given))
        except (TypeError, ValueError) as error:
            raise UserError(_flag(name), got=repr(given)[:60], expected=expected) from error
        if count not in (0, len(numbers)):
            raise UserError(_flag(name), got=numbers, expected=expected)
        object.__setattr__(self, name, numbers)

    def _guidance_of(self, cfg: float) -> float:
        if self.guidance is not None:
            raise UserError("--cfg and --guidance are one setting, counted in two ways", fix="name one of them")
        if not 1 <= cfg < INFINITE:
            raise UserError("--cfg", got=cfg, expected="1 (off) or more")
        return round(cfg - 1, 6)  # 4.1 is 3.1, and not a rounding error less


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _each(values: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """One for each of so many: as they are, or the only one again and again."""
    return values if len(values) == count else values * count


def _flag(name: str) -> str:
    """As the command line calls a setting."""
    return f"--{name.replace('_', '-')}"
