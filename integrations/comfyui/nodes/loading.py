"""Our transformer, text encoder and VAE for the nodes of others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from zimage_lite.api import open_named
from zimage_lite.checkpoint.model_files import find_tokenizer
from zimage_lite.config import RuntimeOptions
from zimage_lite.errors import UserError
from zimage_lite.pipeline.drawing import Pipeline
from zimage_lite.units import parse_bytes

from . import places
from .running import log

_STAND_IN = "synthetic:bf16"  # for the parts that a file does not have; nobody asks them


class LoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            "transformer",
            "Model",
            "A MODEL whose steps are computed by zimage-lite, in any of its formats, streamed where it does not fit. "
            "ComfyUI's samplers and LoRA loaders work on it; what cannot be applied is refused by name.",
            io.Model.Output(),
        )

    @classmethod
    def execute(cls, **given: Any) -> io.NodeOutput:
        from .own_model import our_model

        return io.NodeOutput(our_model(_opened("transformer", given)))


class LoadEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            "text_encoder", "Encoder", "Qwen3 as a CLIP, computed by zimage-lite; gone again when it is done.",
            io.Clip.Output(),
        )  # fmt: skip

    @classmethod
    def execute(cls, **given: Any) -> io.NodeOutput:
        from .own_encoder import OurEncoder

        return io.NodeOutput(OurEncoder(_opened("text_encoder", given)))


class LoadVae(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            "vae", "VAE", "A VAE that computes in exact bands of rows: large pictures fit, and no seams are blended.",
            io.Vae.Output(),
        )  # fmt: skip

    @classmethod
    def execute(cls, **given: Any) -> io.NodeOutput:
        from .own_vae import OurVae

        return io.NodeOutput(OurVae(_opened("vae", given)))


def _schema(kind: str, name: str, description: str, output: io.Output) -> io.Schema:
    hint = "Such as 6GB; left empty, what ComfyUI leaves free."
    return io.Schema(
        node_id=f"ZImageLiteLoad{name}",
        display_name=f"Load {name} (zimage-lite)",
        category="zimage-lite",
        description=description,
        inputs=[
            io.Combo.Input("source", places.sources_of(kind)),
            io.String.Input("vram", default="", tooltip=f"Ceiling of its plan on the GPU. {hint}", advanced=True),
            io.String.Input("ram", default="", tooltip=f"Ceiling of its plan in RAM. {hint}", advanced=True),
        ],
        outputs=[output],
    )


def _opened(kind: str, given: dict[str, Any]) -> Pipeline:
    """Of a whole model, or of one file. Raises UserError."""
    found = places.source(given["source"])
    if found.is_file() and not places.is_whole(found):
        files = replace(open_named(_STAND_IN, {kind: found}), name=found.stem, synthetic=False)
        if kind == "text_encoder":
            tokenizer = find_tokenizer(None, files.text_encoder)
            if tokenizer is None:
                raise UserError(f"{found.name}: its tokenizer is not Qwen3's", fix="choose a whole model")
            files = replace(files, tokenizer=tokenizer)
    else:
        files = open_named(found, {})
    vram, ram = (parse_bytes(text) if (text := given[name].strip()) else None for name in ("vram", "ram"))
    return Pipeline(files, RuntimeOptions(vram_bytes=vram, ram_bytes=ram), tell=log.info)
