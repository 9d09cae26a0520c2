"""The two calls for scripts and notebooks. Arguments are named and mean as on the command line."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from .checkpoint.model_card import DEMO, model_folder
from .checkpoint.model_files import open_model
from .config import RuntimeOptions
from .conversion import Written
from .conversion import quantize as _quantize
from .pipeline import Pipeline
from .units import parse_bytes

StrPath = str | PathLike[str]


def load(
    model: StrPath = DEMO,
    *,
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "auto",
    vram: str | None = None,
    ram: str | None = None,
    transformer: StrPath | None = None,
    text_encoder: StrPath | None = None,
    vae: StrPath | None = None,
    tokenizer: StrPath | None = None,
) -> Pipeline:
    """Open a model folder, or the built-in demo. Nothing is loaded before `Pipeline.generate`. Raises UserError.

    vram, ram: ceilings such as "6GB"; the other paths replace parts of the model.
    """
    replaced = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae, "tokenizer": tokenizer}
    files = open_model(model_folder(model), {name: Path(path) for name, path in replaced.items() if path is not None})
    options = RuntimeOptions(
        device=device,
        dtype=dtype,
        backend=backend,
        vram_bytes=parse_bytes(vram) if vram else None,
        ram_bytes=parse_bytes(ram) if ram else None,
    )
    return Pipeline(files, options)


def quantize(
    source: StrPath, out: StrPath, to: str, *, text_encoder_to: str | None = None, overwrite: bool = False
) -> list[Written]:
    """Convert a model folder or a single weights file to format `to`. Raises UserError."""
    return _quantize(model_folder(source), Path(out), to, text_encoder_to=text_encoder_to, overwrite=overwrite)
