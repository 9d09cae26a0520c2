"""`quantize` for whatever the user has: one file, one component of a model, or a whole model folder.

A model folder comes out as a model folder: transformer and text encoder converted, VAE, tokenizer, schedule and
configs carried over.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint.checkpoint import WEIGHT_SUFFIXES, Checkpoint, weight_files
from .checkpoint.detect import COMPONENTS
from .checkpoint.diffusers_config import config_json, model_index
from .checkpoint.model_card import CARD
from .checkpoint.model_files import find_component, scheduler_config
from .checkpoint.output import replacing, require_absent, require_space
from .checkpoint.tokenizer import PromptTokenizer, tokenizer_from_folder, tokenizer_to_gguf
from .errors import UserError
from .loading import open_complete
from .quant.convert import container_of, convert, output_tensors
from .quant.formats import Format, target_format
from .quant.tensor import rows_columns

KEEP = "keep"
_ENTRIES = {*COMPONENTS, "tokenizer", "scheduler", "model_index.json", CARD}  # of an output folder

Progress = Callable[[int, int], None]  # source bytes done, in all


@dataclass(frozen=True)
class Written:
    """One component of the output. format: a name from the table, or "keep"."""

    component: str
    format: str
    path: Path
    source_bytes: int
    bytes: int


def encoder_target(transformer: Format) -> str:
    """Text encoders stay weight-only, in a format of about the transformer's size."""
    if not transformer.lossy:
        return KEEP
    return "q8_0" if transformer.bits_per_weight() > 6 else "q4_0"


def quantize(
    source: Path,
    out: Path | None,
    to: str,
    *,
    text_encoder_to: str | None = None,
    component: str = "all",
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> list[Written]:
    """Convert `source`, a weights file or a model folder, and return what was written. Raises UserError.

    out: default is the source's name with the format added, in the current folder.
    """
    target = target_format(to)
    encoder = text_encoder_to or encoder_target(target)
    if encoder != KEEP:
        target_format(encoder, "--text-encoder-to", also=(KEEP,))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device cuda: torch {torch.__version__} sees no such device", fix="use --device cpu")
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    single = source if source.is_file() else None
    if single is None and component != "all":
        single = find_component(source, component)
        if single is None:
            raise UserError(f"{source} has no {component}/", expected=f"a model folder with a {COMPONENTS[component]}")
    if single is not None:
        if component == "text_encoder" and text_encoder_to not in (None, KEEP, to):
            raise UserError(
                "--to and --text-encoder-to disagree", fix="with --component text_encoder, name one of them"
            )
        part = None if component == "all" else component
        return [_quantize_file(single, out, target, source, part, device, overwrite, progress)]
    return _quantize_folder(source, out, target, encoder, device, overwrite, progress)


def _quantize_file(
    path: Path, out: Path | None, target: Format, source: Path, component: str | None,
    device: str, overwrite: bool, progress: Progress,
) -> Written:  # fmt: skip
    checkpoint = open_complete(path, component)
    if checkpoint.component == "vae":
        raise UserError(f"{path}: a VAE stays as it is", fix="quantize the transformer and the text encoder")
    suffix = f".{container_of(target)}"
    stem = source.stem if source.is_file() else f"{source.resolve().name}-{checkpoint.component}"
    out = out or Path(f"{stem}-{target.name}{suffix}")
    if out.is_dir():
        raise UserError(f"{out} is a folder", fix="name the file to write with -o")
    if out.suffix in WEIGHT_SUFFIXES and out.suffix != suffix:
        raise UserError(
            f"{out}: other programs go by the name's end", got=out.suffix, expected=f"{suffix} for {target.name}"
        )
    require_absent(out, overwrite)
    _require_apart(out, checkpoint)
    meter = _Meter(progress, _source_bytes(checkpoint, target.name))
    convert(
        checkpoint, target, out, metadata=_tokenizer_metadata(checkpoint, source, target), device=device, on_bytes=meter
    )
    return Written(checkpoint.component, target.name, out, checkpoint.nbytes, out.stat().st_size)


def _quantize_folder(
    source: Path, out: Path | None, target: Format, encoder: str, device: str, overwrite: bool, progress: Progress
) -> list[Written]:
    out = out or Path(f"{source.resolve().name}-{target.name}")
    require_absent(out, overwrite)
    _require_replaceable(out)
    targets: dict[str, str] = {"transformer": target.name, "text_encoder": encoder, "vae": KEEP}
    checkpoints = {component: _open_part(source, component) for component in targets}
    _require_apart(out, *checkpoints.values())
    meter = _Meter(progress, sum(_source_bytes(checkpoints[part], to) for part, to in targets.items()))
    require_space(out.resolve().parent, sum(_estimate(checkpoints[part], to) for part, to in targets.items()))
    written = []
    with replacing(out) as partial:
        partial.mkdir()
        for component, to in targets.items():
            folder = partial / component
            folder.mkdir()
            name = _write_part(checkpoints[component], to, folder, source, device, meter)
            size = sum(file.stat().st_size for file in folder.iterdir())
            written.append(Written(component, to, out / component / name, checkpoints[component].nbytes, size))
        _carry_over(source, partial)
    return written


def _require_replaceable(out: Path) -> None:
    """Raise UserError if `out` holds anything that this program does not write."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, and a model folder comes out as a folder", fix="choose another name with -o")
    foreign = [entry.name for entry in out.iterdir() if entry.name not in _ENTRIES] if out.exists() else []
    if foreign:
        raise UserError(
            f"{out} holds more than a model, so it is not replaced", got=foreign[0], fix="choose another name with -o"
        )


def _require_apart(out: Path, *sources: Checkpoint) -> None:
    """Raise UserError if writing `out` would replace a file that is read, or a folder around one."""
    tensors = [tensor for source in sources for tensor in source.tensors.values()]
    for file in {entry.path for tensor in tensors for entry in tensor.parts.values()}:
        if out.resolve() in {place.resolve() for place in (file, *file.absolute().parents)}:
            raise UserError(f"{out}: the output would replace its own source", fix="choose another name with -o")


def _open_part(source: Path, component: str) -> Checkpoint:
    path = find_component(source, component)
    if path is None:
        raise UserError(
            f"{source} has no {component}/", expected="a model folder with transformer/, text_encoder/ and vae/"
        )
    return open_complete(path, component)


def _write_part(checkpoint: Checkpoint, to: str, folder: Path, source: Path, device: str, meter: _Meter) -> str:
    """Convert or copy one component into `folder`; returns the name of its (first) weights file."""
    _write_json(folder / "config.json", _config(checkpoint))
    if to == KEEP:
        files = weight_files(checkpoint.source) if checkpoint.source.is_dir() else [checkpoint.source]
        indices = checkpoint.source.glob("*.safetensors.index.json") if checkpoint.source.is_dir() else []
        for file in (*files, *indices):
            shutil.copyfile(file, folder / file.name)
        meter(checkpoint.nbytes)
        return files[0].name
    target = target_format(to)
    name = f"{checkpoint.component}-{to}.{container_of(target)}"
    convert(
        checkpoint,
        target,
        folder / name,
        metadata=_tokenizer_metadata(checkpoint, source, target),
        device=device,
        on_bytes=meter,
    )
    return name


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The source's own config.json where it has one, for it may say more than we know."""
    path = checkpoint.source / "config.json"
    if checkpoint.source.is_dir() and path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    return config_json(checkpoint.config)


def _carry_over(source: Path, out: Path) -> None:
    """Tokenizer, schedule, card and index: copied where they are, written anew where a ComfyUI folder has none."""
    for name in ("tokenizer", "scheduler"):
        if (source / name).is_dir():
            shutil.copytree(source / name, out / name)
    if (source / CARD).exists():
        shutil.copyfile(source / CARD, out / CARD)
    if not (out / "scheduler").exists():
        (out / "scheduler").mkdir()
        _write_json(out / "scheduler" / "scheduler_config.json", config_json(scheduler_config(None)))
    index = source / "model_index.json"
    _write_json(
        out / "model_index.json", json.loads(index.read_text(encoding="utf-8")) if index.exists() else model_index()
    )


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tokenizer_metadata(checkpoint: Checkpoint, source: Path, target: Format) -> dict[str, Any]:
    """A text encoder in a GGUF file carries its tokenizer, when one is at hand."""
    if checkpoint.component != "text_encoder" or container_of(target) != "gguf":
        return {}
    inside = {key: value for key, value in checkpoint.metadata.items() if key.startswith("tokenizer.")}
    folder = source / "tokenizer"
    if inside or not folder.is_dir():
        return inside
    tokenizer: PromptTokenizer = tokenizer_from_folder(folder)
    return tokenizer_to_gguf(tokenizer, checkpoint.config.vocab_size)


def _source_bytes(checkpoint: Checkpoint, to: str) -> int:
    """Bytes that will be read, which leaves out what no output needs."""
    if to == KEEP:
        return checkpoint.nbytes
    return sum(part.nbytes for tensor in output_tensors(checkpoint, target_format(to)) for part in tensor.sources)


def _estimate(checkpoint: Checkpoint, to: str) -> int:
    """Bytes that the component will take on the disk, headers aside."""
    if to == KEEP:
        return checkpoint.nbytes
    tensors = output_tensors(checkpoint, target_format(to))
    bits = 0.0
    for tensor in tensors:
        rows, columns = rows_columns(tensor.shape)
        bits += rows * columns * tensor.format.bits_per_weight(columns)
    return int(bits / 8)


class _Meter:
    """Adds up what several conversions report."""

    def __init__(self, progress: Progress, total_bytes: int) -> None:
        self.progress, self.total_bytes, self.done_bytes = progress, total_bytes, 0

    def __call__(self, n_bytes: int) -> None:
        self.done_bytes += n_bytes
        self.progress(self.done_bytes, self.total_bytes)
