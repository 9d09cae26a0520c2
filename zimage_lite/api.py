"""The two calls for scripts and notebooks. Arguments are named and mean as on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

from .checkpoint.hub import is_hub_id, snapshot
from .checkpoint.model_card import DEMO, model_folder
from .checkpoint.model_files import ModelFiles, open_model
from .config import Lora, RuntimeOptions
from .convert.job import Written
from .convert.quantize import quantize as _quantize
from .convert.synthetic import is_synthetic, open_synthetic
from .pipeline.drawing import Pipeline
from .pipeline.workspace import silent
from .units import ceiling

StrPath = str | PathLike[str]


def load(
    model: StrPath | None = DEMO,
    *,
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "auto",
    compute: str = "auto",
    vram: str | None = None,
    ram: str | None = None,
    transformer: StrPath | None = None,
    text_encoder: StrPath | None = None,
    vae: StrPath | None = None,
    siglip: StrPath | None = None,
    tokenizer: StrPath | None = None,
    cache: bool = True,
    tell: Callable[[str], None] = silent,
) -> Pipeline:
    """Open a model folder, one of the Hub, the built-in demo, or "synthetic:FORMAT"; None if all parts are
    named. Raises UserError.

    Nothing is loaded before `Pipeline.generate`. vram, ram: ceilings such as "6GB"; cache: keep prompt embeddings on
    the disk; tell: gets a line when memory ran out and less is used, or torch runs in the place of kernels; the other
    paths replace parts of the model.
    """
    replaced = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae, "siglip": siglip}
    replaced |= {"tokenizer": tokenizer}
    files = open_named(model, {name: Path(path) for name, path in replaced.items() if path is not None})
    options = RuntimeOptions(
        device=device,
        dtype=dtype,
        backend=backend,
        compute=compute,
        vram_bytes=ceiling(vram),
        ram_bytes=ceiling(ram),
        cache=cache,
    )
    return Pipeline(files, options, tell)


def open_named(model: StrPath | None, parts: Mapping[str, Path | None]) -> ModelFiles:
    """What MODEL means: a folder, an all-in-one file, "demo", or as text "synthetic:FORMAT" or a Hub id, which is
    downloaded first.

    parts: "transformer", "text_encoder", "vae", "siglip" or "tokenizer" -> what replaces the model's. Raises UserError.
    """
    if isinstance(model, str) and is_synthetic(model):
        return open_synthetic(model, parts)
    if isinstance(model, str) and is_hub_id(model):
        return replace(open_model(snapshot(model), parts), name=model)  # else its name would be the commit's
    return open_model(None if model is None else model_folder(model), parts)


def quantize(
    source: StrPath,
    out: StrPath,
    to: str,
    *,
    text_encoder_to: str | None = None,
    keep: Sequence[str] = (),
    tensors: Sequence[str] = (),
    effort: str = "reference",
    calibration: StrPath | None = None,
    repair: StrPath | None = None,
    repair_rank: int | None = None,
    merge_loras: Sequence[Lora | str] = (),
    measure: bool = False,
    overwrite: bool = False,
) -> list[Written]:
    """Convert a model (also one of the Hub) or a single weights file to format `to`. Raises UserError.

    keep: patterns of tensors that stay 16-bit; tensors: "PATTERN=FORMAT"; calibration: statistics, or an imatrix, that
    errors in the transformer are weighed by; repair: a file for a LoRA of repair_rank, by default 32, that takes back
    part of them; merge_loras: adapters, as texts "PATH:STRENGTH", that become part of the transformer; measure: fill
    `Written.errors`.
    """
    return _quantize(
        source if isinstance(source, str) and is_hub_id(source) else model_folder(source),
        Path(out),
        to,
        text_encoder_to=text_encoder_to,
        keep=keep,
        tensors=tensors,
        effort=effort,
        calibration=Path(calibration) if calibration else None,
        repair=Path(repair) if repair else None,
        repair_rank=repair_rank,
        merge_loras=Lora.several(merge_loras),
        measure=measure,
        overwrite=overwrite,
    )
