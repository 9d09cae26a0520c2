"""`zimage-lite quantize` as a node: a model or a file of ComfyUI's folders, or a model of the Hub, made smaller."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management as management
from comfy.utils import ProgressBar
from comfy_api.latest import io, ui

from zimage_lite.config import Lora
from zimage_lite.convert.quantize import quantize
from zimage_lite.convert.recipe import KEEP, target, targets
from zimage_lite.quant.formats import EFFORTS
from zimage_lite.units import format_gb

from . import places
from .more import Loras
from .running import Notes

_SAME_SIZE = "(of the same size)"


class Quantize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageLiteQuantize",
            display_name="Quantize (zimage-lite)",
            category="zimage-lite",
            description="Writes a smaller model beside the one it is made from: whole or not at all.",
            is_output_node=True,
            not_idempotent=True,
            inputs=[
                io.Combo.Input("source", places.sources()),
                io.Combo.Input("to", list(targets()), default="int8"),
                io.String.Input(
                    "hub", default="", tooltip="OWNER/NAME of a model on the Hub, in the place of the source."
                ),
                io.Combo.Input("text_encoder_to", [_SAME_SIZE, KEEP, *targets()], advanced=True),
                io.Combo.Input("effort", list(EFFORTS), default="reference", advanced=True),
                io.Boolean.Input("overwrite", default=False, advanced=True),
                Loras.Input("merge_loras", optional=True, tooltip="Made part of the transformer before."),
            ],
            outputs=[io.String.Output("path"), io.String.Output("report")],
        )

    @classmethod
    def execute(
        cls, source: str, to: str, hub: str, text_encoder_to: str, effort: str, overwrite: bool,
        merge_loras: tuple[Lora, ...] = (),
    ) -> io.NodeOutput:  # fmt: skip
        bar, notes = ProgressBar(1), Notes()
        found = hub.strip() or places.source(source)
        out = _out(found, to)
        out.parent.mkdir(parents=True, exist_ok=True)
        written = quantize(
            found,
            out,
            to,
            text_encoder_to=None if text_encoder_to == _SAME_SIZE else text_encoder_to,
            effort=effort,
            overwrite=overwrite,
            discard_source=isinstance(found, str),
            merge_loras=merge_loras,
            progress=bar.update_absolute,
            downloaded=lambda n_bytes: management.throw_exception_if_processing_interrupted(),
            note=notes.tell,
        )
        parts = [
            f"{part.component} to {part.format}: {format_gb(part.source_bytes)} -> {format_gb(part.bytes)}"
            for part in written
        ]
        report = "\n".join([str(out), *parts, *notes])
        return io.NodeOutput(str(out), report, ui=ui.PreviewText(report))


def _out(source: Path | str, to: str) -> Path:
    """A file beside its source; a model among our models."""
    if isinstance(source, str):
        return places.model_home() / f"{source.rpartition('/')[2]}-{to}"
    if source.is_dir() or places.is_whole(source):
        return places.model_home() / f"{source.stem if source.is_file() else source.name}-{to}"
    return source.with_name(f"{source.stem}-{to}{target(to).suffix}")
