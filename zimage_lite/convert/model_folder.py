"""A whole model, quantized into a folder that holds all of one.

Transformer and text encoder are converted; VAE, tokenizer, schedule and configs are carried over.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.detect import COMPONENTS, VISION
from ..checkpoint.diffusers_config import config_json, image_processor, model_index
from ..checkpoint.model_card import CARD
from ..checkpoint.model_files import find_component, scheduler_config
from ..checkpoint.output import replacing
from ..checkpoint.tokenizer import save_tokenizer
from ..checkpoint.weight_files import WeightSet, weight_set
from ..errors import UserError
from .complete import open_complete
from .fidelity import TensorError
from .job import Job, Meter, Written, convert_part, expect, prepare, source_name
from .merging import with_merged
from .output_file import output_tensors, quantization_config
from .recipe import KEEP, as_it_is
from .tokenizers import tokenizer_to_add

_PROCESSOR = "siglip_processor"  # how pictures are laid out for the vision tower
_ENTRIES = {*COMPONENTS, VISION, _PROCESSOR, "tokenizer", "scheduler", "model_index.json", CARD}  # of an output folder
_LITTER = {".DS_Store", "desktop.ini", "Thumbs.db"}  # Finder and Explorer leave it wherever they have looked
_DIFFUSERS_NAMES = {
    "transformer": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model",
    VISION: "model",
}  # fmt: skip


def quantize_model(source: Path, out: Path | None, job: Job) -> list[Written]:
    """Convert a model into the folder `out`, whole or not at all. Raises UserError."""
    out = out or Path(f"{source_name(source)}-{job.target.name}")
    checkpoints = {component: _open_part(source, component, job) for component in _parts(source)}
    prepare(out, list(checkpoints.values()), job)
    _require_replaceable(out)
    job = job.settled(checkpoints["transformer"])
    meter = expect(out, [(checkpoint, job.target_of(part)) for part, checkpoint in checkpoints.items()], job)
    tokenizer = tokenizer_to_add(source, checkpoints["text_encoder"], job.note)
    written = []
    with replacing(out, precious=True) as partial:
        partial.mkdir()
        for component, checkpoint in checkpoints.items():
            folder = partial / component
            folder.mkdir()
            name, errors = _write_part(checkpoint, folder, source, job, meter)
            size = sum(file.stat().st_size for file in folder.iterdir())
            to = job.target_of(component)
            written.append(
                Written(
                    component, to.name if to else KEEP, out / component / name, checkpoint.nbytes, size, tuple(errors)
                )
            )
        _carry_over(source, partial)
        if tokenizer is not None:
            save_tokenizer(partial / "tokenizer", tokenizer)
    return written


def _parts(source: Path) -> tuple[str, ...]:
    """With the vision tower, where there is one."""
    sees = source.is_dir() and find_component(source, VISION)
    return (*COMPONENTS, VISION) if sees else tuple(COMPONENTS)


def _open_part(source: Path, component: str, job: Job) -> Checkpoint:
    path = find_component(source, component)
    if path is None:
        lacks = f"{component}/" if source.is_dir() else COMPONENTS[component]
        raise UserError(f"{source} has no {lacks}", fix="convert what it has, one by one, with --component")
    checkpoint = open_complete(path, component, job.files.file_bytes)
    return with_merged(checkpoint, job.loras, job.note, not job.files.file_bytes)


def _require_replaceable(out: Path) -> None:
    """Raise UserError if `out` holds anything that this program does not write."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, and a model folder comes out as a folder", fix="choose another name with -o")
    foreign = [entry.name for entry in out.iterdir() if entry.name not in _ENTRIES | _LITTER] if out.exists() else []
    if foreign:
        raise UserError(
            f"{out} holds more than a model, so it is not replaced", got=foreign[0], fix="choose another name with -o"
        )


def _write_part(
    checkpoint: Checkpoint, folder: Path, source: Path, job: Job, meter: Meter
) -> tuple[str, list[TensorError]]:
    """Convert or copy one component into `folder`; returns the name of its (first) weights file."""
    to = job.target_of(checkpoint.component)
    config = _config(checkpoint)
    if to is None and checkpoint.source != source:
        _write_json(folder / "config.json", config)
        return _copy_weights(checkpoint, folder, job, meter), []
    to = to or as_it_is()  # out of an all-in-one file
    config.pop("quantization_config", None)
    _write_json(folder / "config.json", {**config, **quantization_config(to, output_tensors(checkpoint, to))})
    standard = to.container in ("bnb", "quanto") or to.name == KEEP
    name = (_DIFFUSERS_NAMES[checkpoint.component] if standard else f"{checkpoint.component}-{to.name}") + to.suffix
    return name, convert_part(checkpoint, to, folder / name, source, job, meter)


def _copy_weights(checkpoint: Checkpoint, folder: Path, job: Job, meter: Meter) -> str:
    """Returns the name of the (first) file."""
    is_folder = checkpoint.source.is_dir()
    found = weight_set(checkpoint.source) if is_folder else WeightSet((checkpoint.source,), False)
    for file in (*found.files, *filter(None, [found.index])):
        job.files.fetch(file)
        shutil.copyfile(file, folder / file.name)
        job.files.release(file)
    checkpoint.require_unchanged()
    meter(checkpoint.nbytes)
    return found.files[0].name


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The source's own config.json where it has one, for it may say more than we know."""
    path = checkpoint.source / "config.json"
    if checkpoint.source.is_dir() and path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    return config_json(checkpoint.config)


def _carry_over(source: Path, out: Path) -> None:
    """Tokenizer, schedule, card and index: copied where they are, written anew where a ComfyUI folder has none."""
    for name in ("tokenizer", "scheduler", _PROCESSOR):
        if (source / name).is_dir():
            shutil.copytree(source / name, out / name)
    if (source / CARD).exists():
        shutil.copyfile(source / CARD, out / CARD)
    if not (out / "scheduler").exists():
        (out / "scheduler").mkdir()
        _write_json(out / "scheduler" / "scheduler_config.json", config_json(scheduler_config(None)))
    sees = (out / VISION).exists()
    if sees and not (out / _PROCESSOR).exists():
        (out / _PROCESSOR).mkdir()
        _write_json(out / _PROCESSOR / "preprocessor_config.json", image_processor())
    index = source / "model_index.json"
    _write_json(
        out / "model_index.json", json.loads(index.read_text(encoding="utf-8")) if index.exists() else model_index(sees)
    )


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
