"""The whole pipeline as one node: what `zimage-lite generate` draws, inside the memory that it is given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from zimage_lite import GenerateOptions, load
from zimage_lite.config import FITS, INPAINT_AREAS, SAMPLERS, SCHEDULES
from zimage_lite.pipeline.drawing import Pipeline
from zimage_lite.units import format_gb

from . import places
from .more import Controls, Loras
from .running import Notes, Watch, alone

_MAX_SEED = 2**53 - 1  # as far as JavaScript counts
_AS_MODEL = "0: the model's own"
_PARTS = ("transformer", "text_encoder", "vae")
_OPEN_AT_ZERO = ("width", "height", "steps", "shift", "cfg", "strength")  # their 0 leaves them to the model


def part_inputs() -> list[io.Input]:
    """A model, and what replaces parts of it."""
    return [
        io.Combo.Input("model", [*places.models(), places.OF_PARTS]),
        *(io.Combo.Input(kind, [places.OWN, *places.files(kind)], advanced=True) for kind in _PARTS),
    ]


def memory_inputs() -> list[io.Input]:
    hint = "Such as 6GB; left empty, what is free."
    return [
        io.String.Input("vram", default="", tooltip=f"Ceiling for the GPU's memory. {hint}", advanced=True),
        io.String.Input("ram", default="", tooltip=f"Ceiling for this process's memory. {hint}", advanced=True),
    ]


def opened(given: dict[str, Any], notes: Notes) -> Pipeline:
    """given: what `part_inputs` and `memory_inputs` ask for. Raises UserError."""
    parts = {kind: places.part(kind, given[kind]) for kind in _PARTS}
    ceilings = {name: given[name].strip() or None for name in ("vram", "ram")}
    return load(places.model(given["model"]), tell=notes.tell, **parts, **ceilings)


class Generate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageLiteGenerate",
            display_name="Generate (zimage-lite)",
            category="zimage-lite",
            description="Prompt to picture with Z-Image, inside the memory that you name: what is not needed at once "
            "streams. ComfyUI's models leave the GPU first, and nothing stays there afterwards.",
            search_aliases=["z-image", "zimage", "turbo", "low vram"],
            inputs=[
                *part_inputs(),
                io.String.Input("prompt", multiline=True, dynamic_prompts=True),
                io.String.Input("negative", multiline=True, tooltip="What to steer away from, with a cfg above 1."),
                *_number_inputs(),
                io.Combo.Input("sampler", list(SAMPLERS)),
                io.Combo.Input("schedule", list(SCHEDULES)),
                io.Float.Input("shift", default=0.0, min=0.0, max=100.0, step=0.1, tooltip=_AS_MODEL, advanced=True),
                *_picture_inputs(),
                Loras.Input("loras", optional=True),
                Controls.Input("controls", optional=True),
                *memory_inputs(),
            ],
            outputs=[
                io.Image.Output("image"),
                io.String.Output("report", tooltip="Seeds, notes, times, and memory as planned and as used."),
            ],
        )

    @classmethod
    def execute(cls, **given: Any) -> io.NodeOutput:
        requests, notes = list(_requests(given)), Notes()
        with alone():
            pipeline = opened(given, notes)
            watch = Watch(pipeline.model)
            drawn = pipeline.generate(requests, watch.progress, watch.on_step)
            report = "\n".join([*_told(pipeline, requests), *notes])
            del pipeline, watch
        return io.NodeOutput(torch.stack(drawn).float() / 255, report)


def _number_inputs() -> list[io.Input]:
    side = {"default": 0, "min": 0, "max": 16384, "step": 16}
    return [
        io.Int.Input("width", **side, tooltip=f"{_AS_MODEL}, or the picture's."),
        io.Int.Input("height", **side, tooltip=f"{_AS_MODEL}, or the picture's."),
        io.Int.Input("seed", default=0, min=0, max=_MAX_SEED, control_after_generate=True),
        io.Int.Input("count", default=1, min=1, max=64, tooltip="Pictures; their seeds count up."),
        io.Int.Input("steps", default=0, min=0, max=1000, tooltip=f"{_AS_MODEL}; Turbo 8."),
        io.Float.Input("cfg", default=0.0, min=0.0, max=100.0, step=0.1, tooltip=f"{_AS_MODEL}; Turbo 1: off."),
    ]


def _picture_inputs() -> list[io.Input]:
    return [
        io.Image.Input("image", optional=True, tooltip="Drawn over: all of it, or what the mask names."),
        io.Mask.Input("mask", optional=True),
        io.Float.Input(
            "strength", default=0.0, min=0.0, max=1.0, step=0.01, tooltip="0: 0.6, or 1 with a mask.", advanced=True
        ),
        io.Combo.Input("fit", list(FITS), tooltip="Of a picture to width and height.", advanced=True),
        io.Combo.Input("inpaint_area", list(INPAINT_AREAS), advanced=True),
    ]


def _requests(given: dict[str, Any]) -> Iterator[GenerateOptions]:
    """One for each picture, `count` of each, seeds counting up. Raises UserError."""
    settings = {name: given[name] or None for name in _OPEN_AT_ZERO}
    settings |= {name: given[name] for name in ("prompt", "negative", "sampler", "schedule", "fit", "inpaint_area")}
    controls = given.get("controls") or ()
    settings |= {
        "loras": given.get("loras") or (),
        "controls": tuple(use for use, _, _ in controls),
        "control_image": tuple(image for _, image, _ in controls) or None,
        "control_from": tuple(source for _, _, source in controls) or ("map",),
    }
    for image, mask in _pictures(given.get("image"), given.get("mask")):
        for i in range(given["count"]):
            yield GenerateOptions(seed=given["seed"] + i, image=image, mask=mask, **settings)


def _pictures(images: Tensor | None, masks: Tensor | None) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """images: [b, h, w, 3], masks: [b, h, w], of which the last one counts on."""
    if images is None:
        yield None, masks if masks is None else masks[0]
        return
    for i, image in enumerate(images):
        yield image, None if masks is None else masks[min(i, len(masks) - 1)]


def _told(pipeline: Pipeline, requests: list[GenerateOptions]) -> Iterator[str]:
    yield f"seed {', '.join(str(request.seed) for request in requests)}"
    for name, plan in pipeline.plans.items():
        took = pipeline.meter.phases[name]
        gpu = plan.device == "gpu"
        planned = plan.peak_vram_bytes if gpu else plan.peak_ram_bytes
        used = int(took["peak_reserved_bytes" if gpu else "peak_rss_bytes"])
        where = "GPU memory" if gpu else "memory"
        yield f"{name}: {took['seconds']:.1f} s, {format_gb(used)} of {where}, {format_gb(planned)} were planned"
