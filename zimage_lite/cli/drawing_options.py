"""The options of `generate` that say how a picture is drawn, and what it is made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..config import (
    CONTROL_MATHS,
    CONTROL_SOURCES,
    FITS,
    INPAINT_AREAS,
    MOST_REFERENCES,
    REFERENCE_POSITIONS,
    SAMPLERS,
    SCHEDULES,
    STRENGTH_MODES,
    GenerateOptions,
)

_IMAGE = GenerateOptions()


class Numbers(click.ParamType):
    """So many numbers with commas between them; any number of them if `count` is 0."""

    def __init__(self, count: int = 0, kind: type[int] | type[float] = float) -> None:
        self.count, self.kind = count, kind
        self.name = ",".join(["N"] * count) if count else "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(self.kind(part) for part in value.split(","))
        except ValueError:
            found = ()
        if not found or self.count not in (0, len(found)):
            self.fail(f"got {value!r}, expected {self.count or 'some'} numbers with commas between them", param, ctx)
        return found


class Factor(click.ParamType):
    """2x, or 1.5."""

    name = "factor"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return float(str(value).lower().removesuffix("x"))
        except ValueError:
            self.fail(f"got {value!r}, expected a factor such as 2x", param, ctx)


_SAMPLING = (
    click.option("--sampler", type=click.Choice(SAMPLERS), default=_IMAGE.sampler, show_default=True),
    click.option(
        "--schedule",
        type=click.Choice(SCHEDULES),
        default=_IMAGE.schedule,
        show_default=True,
        help="How the noise levels are spaced, by the names of ComfyUI.",
    ),
    click.option(
        "--sigmas",
        type=Numbers(),
        default=(),
        metavar="1,0.9,...,0",
        help="The noise levels themselves, instead of --schedule, --shift and --steps.",
    ),
    click.option(
        "--variation",
        type=float,
        default=_IMAGE.variation,
        show_default=True,
        help="Move the prompt's embedding at random by so much in the first fifth of the steps, so that seeds give "
        "different pictures; Turbo's users take 15 to 30.",
    ),
    click.option(
        "--guidance-range",
        type=Numbers(2),
        default=_IMAGE.guidance_range,
        metavar="FROM,TO",
        help="Parts of the steps between which guidance is on.  [default: 0,1]",
    ),
    click.option(
        "--cfg-normalization",
        type=float,
        default=_IMAGE.cfg_normalization,
        help="Guidance makes each step at most so many times as long as the prompt alone does, as in diffusers, where "
        "True is 1.  [default: off]",
    ),
    click.option(
        "--cfg-truncation",
        type=float,
        default=_IMAGE.cfg_truncation,
        help="Guidance is off once 1 - sigma is above this, as in diffusers.  [default: never]",
    ),
)

_PICTURES = (
    click.option("--image", metavar="FILE", help="Draw over this picture, in its own size unless one is named."),
    click.option(
        "--strength",
        type=float,
        help="How much of it changes: 0 to 1.  [default: 0.6; with a mask or --outpaint 1]",
    ),
    click.option(
        "--strength-mode",
        type=click.Choice(STRENGTH_MODES),
        default=_IMAGE.strength_mode,
        show_default=True,
        help="steps: always --steps steps, the last of a longer schedule, as in ComfyUI; diffusers: all as its "
        "pipelines do it, fewer steps and picture and noise drawn in its order.",
    ),
    click.option(
        "--mask",
        metavar="FILE",
        help="White is drawn anew, black stays as it is to the byte, grey changes later and blends. none: what is "
        "transparent lies on white.  [default: what is transparent in the picture]",
    ),
    click.option(
        "--inpaint-area",
        type=click.Choice(INPAINT_AREAS),
        default=_IMAGE.inpaint_area,
        show_default=True,
        help="What the model sees: the whole picture, or what the mask covers with its surroundings, enlarged.",
    ),
    click.option(
        "--outpaint",
        type=Numbers(4, int),
        metavar="LEFT,TOP,RIGHT,BOTTOM",
        help="Pixels to add on each side, and to draw.",
    ),
    click.option(
        "--fit",
        type=click.Choice(FITS),
        default=_IMAGE.fit,
        show_default=True,
        help="How a picture of another shape gets --width and --height.",
    ),
    click.option("--latents", metavar="FILE", help="Start from what --save-latents wrote, instead of a picture."),
    click.option(
        "--hires",
        type=Factor(),
        metavar="2x",
        help="Enlarge the picture so many times and draw it over; above 4 megapixels in tiles.",
    ),
    click.option(
        "--hires-strength",
        type=float,
        default=_IMAGE.hires_strength,
        show_default=True,
        help="How much of the enlarged picture changes.",
    ),
)

_REFERENCES = (
    click.option(
        "--reference",
        "references",
        multiple=True,
        metavar="PICTURE",
        help=f"A picture that Z-Image Omni or Edit sees beside the prompt, up to {MOST_REFERENCES}, in their order. "
        "Without a size, the image gets the last one's.",
    ),
    click.option(
        "--reference-positions",
        type=click.Choice(REFERENCE_POSITIONS),
        default=_IMAGE.reference_positions,
        show_default=True,
        help="Where the words between them lie: diffusers, as diffusers 0.42 has it; aligned, each where it begins, "
        "which may be how the model was meant (diffusers' issue 13574).",
    ),
)

_CONTROLS = (
    click.option(
        "--control",
        "controls",
        multiple=True,
        metavar="FILE[:SCALE]",
        help="ControlNet (Fun Union 1.0, 2.0, 2.1, also as OWNER/NAME/FILE of the Hub, or the demo's: demo) beside the "
        "transformer, and how strongly it is followed. Once for each.  [default scale: its authors']",
    ),
    click.option(
        "--control-image",
        multiple=True,
        metavar="PICTURE",
        help="What it follows: edges, a pose, depth, ... as a map. Once, or once for each --control.",
    ),
    click.option(
        "--control-from",
        type=click.Choice(CONTROL_SOURCES),
        multiple=True,
        default=_IMAGE.control_from,
        help="What --control-image is: a map as the ControlNet takes it (depth and poses have to be), or a picture of "
        "which canny edges, scribbled strokes, its grey or its coarse pixels are taken.  [default: map]",
    ),
    click.option(
        "--control-start",
        type=float,
        default=_IMAGE.control_start,
        show_default=True,
        help="Part of the steps after which ControlNets are asked.",
    ),
    click.option(
        "--control-end",
        type=float,
        default=_IMAGE.control_end,
        show_default=True,
        help="And until which: later steps cost what they cost without.",
    ),
    click.option(
        "--control-math",
        type=click.Choice(CONTROL_MATHS),
        default=_IMAGE.control_math,
        show_default=True,
        help="authors: as VideoX-Fun has it; diffusers: as diffusers 0.42 has it, to compare with.",
    ),
)

_WATCHING = (
    click.option(
        "--preview",
        metavar="FILE.png|terminal",
        help="After each step, what the picture will be like, small: in a file, or in the terminal if it can show "
        "pictures (kitty, iTerm2, WezTerm, Ghostty, sixel).",
    ),
    click.option(
        "--preview-decoder",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Decode previews with this TAEF1 (taef1.safetensors); sharper.",
    ),
    click.option("--save-latents", is_flag=True, help="Also write NAME.latents.safetensors, for --latents."),
)


def _all(options: tuple[Callable[[Any], Any], ...]) -> Callable[[Any], Any]:
    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


sampling_options, picture_options, watching_options = _all(_SAMPLING), _all(_PICTURES), _all(_WATCHING)
control_options, reference_options = _all(_CONTROLS), _all(_REFERENCES)
DRAWING_FIELDS = (
    "sampler", "schedule", "sigmas", "variation", "guidance_range", "cfg_normalization", "cfg_truncation", "image",
    "strength", "strength_mode", "mask", "inpaint_area", "outpaint", "fit", "latents", "hires", "hires_strength",
    "controls", "control_image", "control_from", "control_start", "control_end", "control_math", "references",
    "reference_positions",
)  # fmt: skip
