"""`quantize` for whatever the user has: one file, one component of a model, or a whole model.

A model comes out as a model folder: transformer and text encoder converted, VAE, tokenizer, schedule and configs
carried over.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.checkpoint import Checkpoint, components_in
from ..checkpoint.detect import COMPONENTS
from ..checkpoint.diffusers_config import config_json, model_index
from ..checkpoint.gguf import encoded_values
from ..checkpoint.hub import LocalFiles, hub_files, is_hub_id
from ..checkpoint.impostors import no_such
from ..checkpoint.model_card import CARD
from ..checkpoint.model_files import find_component, scheduler_config
from ..checkpoint.output import clear_leftovers, replacing, require_absent
from ..checkpoint.tokenizer import PromptTokenizer, tokenizer_from_folder, tokenizer_to_gguf
from ..checkpoint.weight_files import WEIGHT_SUFFIXES, WeightSet, is_weight_file, weight_set
from ..errors import UserError
from ..quant.formats import EFFORTS, FORMATS
from . import streaming as _convert
from .complete import open_complete
from .fidelity import TensorError
from .output_file import output_tensors, quantization_config, require_overrides_fit
from .recipe import KEEP, Target, as_it_is, overridden, target

_ENTRIES = {*COMPONENTS, "tokenizer", "scheduler", "model_index.json", CARD}  # of an output folder
_DIFFUSERS_NAMES = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}

Progress = Callable[[int, int], None]  # source bytes done, in all
Note = Callable[[str], None]  # a line for people


@dataclass(frozen=True)
class Written:
    """One component of the output. format: a recipe's name, or "keep". errors: of each tensor, if measured."""

    component: str
    format: str
    path: Path
    source_bytes: int
    bytes: int
    errors: Sequence[TensorError] = ()


@dataclass(frozen=True)
class Job:
    """What to make, and how. The paths of sources and outputs are given apart."""

    target: Target
    text_encoder: Target | None  # None: copied as it is
    options: _convert.Options = field(default_factory=_convert.Options)
    overwrite: bool = False
    progress: Progress = lambda done, total: None
    note: Note = lambda line: None
    files: LocalFiles = field(default_factory=lambda: LocalFiles(Path()))

    def target_of(self, component: str) -> Target | None:
        if component == "vae":
            return None
        return self.target if component == "transformer" else self.text_encoder


def quantize(
    source: Path | str,
    out: Path | None,
    to: str,
    *,
    text_encoder_to: str | None = None,
    component: str = "all",
    keep: Sequence[str] = (),
    tensors: Sequence[str] = (),
    effort: str = "reference",
    device: str = "cpu",
    measure: bool = False,
    verify: bool = False,
    revision: str | None = None,
    discard_source: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
    downloaded: Callable[[int], None] = lambda n_bytes: None,
    note: Note = lambda line: None,
) -> list[Written]:
    """Convert `source`, a weights file or a model, and return what was written. Raises UserError.

    source: a path, or as text the id of a model on the Hub; then revision is a branch, tag or commit, discard_source
    keeps one of its files at a time and none in the end, and downloaded is told of bytes.

    out: default is the source's name with the format added, in the current folder. keep: patterns of tensors that stay
    16-bit; tensors: PATTERN=FORMAT; of a model, both are about its transformer. measure: decode everything again and
    compare; verify: read it back as well.
    """
    chosen = overridden(target(to), keep, tensors)
    encoder = text_encoder_to or chosen.text_encoder_to
    part = target(encoder, "--text-encoder-to", also=(KEEP,)) if encoder != KEEP else None
    if effort not in EFFORTS:
        raise UserError("--effort", got=repr(effort), expected=", ".join(EFFORTS))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device cuda: torch {torch.__version__} sees no such device", fix="use --device cpu")
    if out is not None:
        require_absent(out, overwrite)
    options = _convert.Options(device, effort, measure or verify, verify)
    parts = tuple(COMPONENTS) if component == "all" else (component,)
    with _files(source, revision, discard_source, out, parts, downloaded) as files:
        job = Job(chosen, part, options, overwrite, progress, note, files)
        single = _single_file(files.path, component)
        if single is None:
            return _quantize_model(files.path, out, job)
        if component == "text_encoder" and text_encoder_to not in (None, KEEP, to):
            raise UserError(
                "--to and --text-encoder-to disagree", fix="with --component text_encoder, name one of them"
            )
        return [_quantize_file(single, out, files.path, None if component == "all" else component, job)]


@contextmanager
def _files(
    source: Path | str, revision: str | None, discard: bool, out: Path | None, components: tuple[str, ...],
    downloaded: Callable[[int], None],
) -> Iterator[LocalFiles]:  # fmt: skip
    """The source's files, wherever they are."""
    if isinstance(source, str) and is_hub_id(source):
        beside = (out or Path("x")).resolve().parent
        with hub_files(
            source, revision, beside=beside, discard=discard, components=components, on_bytes=downloaded
        ) as files:
            yield files
        return
    for flag, given in (("--revision", revision), ("--discard-source", discard)):
        if given:
            raise UserError(f"{flag}: {source} is a path here", fix=f"{flag} is for a model on the Hub, OWNER/NAME")
    if not Path(source).exists():
        raise no_such(source)
    yield LocalFiles(Path(source))


def _single_file(source: Path, component: str) -> Path | None:
    """What to convert if one component is meant; None if all are."""
    if source.is_dir() and any(map(is_weight_file, source.iterdir())):
        return source  # one component's folder
    if component == "all":
        return source if source.is_file() and len(components_in(source)) == 1 else None
    if source.is_file():
        return source
    found = find_component(source, component)
    if found is None:
        raise UserError(f"{source} has no {component}/", expected=f"a model folder with a {COMPONENTS[component]}")
    return found


def _quantize_file(path: Path, out: Path | None, source: Path, component: str | None, job: Job) -> Written:
    checkpoint = open_complete(path, component, job.files.file_bytes)
    if checkpoint.component == "vae":
        raise UserError(f"{path}: a VAE stays as it is", fix="quantize the transformer and the text encoder")
    suffix = job.target.suffix
    stem = _name(source) if component is None and path == source else f"{_name(source)}-{checkpoint.component}"
    out = out or Path(f"{stem}-{job.target.name}{suffix}")
    if out.is_dir():
        raise UserError(f"{out} is a folder", fix="name the file to write with -o")
    if out.suffix in WEIGHT_SUFFIXES and out.suffix != suffix:
        raise UserError(
            f"{out}: other programs go by the name's end", got=out.suffix, expected=f"{suffix} for {job.target.name}"
        )
    _prepare(out, [checkpoint], job)
    _note_lossy(checkpoint, job.target, job.note)
    _expect(out, [checkpoint], _estimate(checkpoint, job.target), job)
    meter = _Meter(job.progress, _source_bytes(checkpoint, job.target))
    extra = _tokenizer_metadata(checkpoint, source, job.target)
    errors = _converted(checkpoint, job.target, out, extra, job, meter)
    return Written(checkpoint.component, job.target.name, out, checkpoint.nbytes, out.stat().st_size, errors)


def _quantize_model(source: Path, out: Path | None, job: Job) -> list[Written]:
    out = out or Path(f"{_name(source)}-{job.target.name}")
    checkpoints = {component: _open_part(source, component, job) for component in COMPONENTS}
    _prepare(out, list(checkpoints.values()), job)
    _require_replaceable(out)
    sizes = {part: _source_bytes(checkpoint, job.target_of(part)) for part, checkpoint in checkpoints.items()}
    meter = _Meter(job.progress, sum(sizes.values()))
    out_bytes = sum(_estimate(checkpoint, job.target_of(part)) for part, checkpoint in checkpoints.items())
    _expect(out, list(checkpoints.values()), out_bytes, job)
    written = []
    with replacing(out) as partial:
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
    return written


def _name(source: Path) -> str:
    return source.stem if source.is_file() else source.resolve().name


def _prepare(out: Path, sources: list[Checkpoint], job: Job) -> None:
    """All that can be refused before anything is written, and what an earlier, killed run left behind."""
    require_absent(out, job.overwrite)
    _require_apart(out, *sources)
    require_overrides_fit(job.target, sources[0])
    for leftover in clear_leftovers(out):
        job.note(f"an earlier run was killed before it had finished: {leftover.name} was cleared away")
    require_absent(out, job.overwrite)  # again, for an old folder may have come back


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


def _open_part(source: Path, component: str, job: Job) -> Checkpoint:
    path = find_component(source, component)
    if path is None:
        raise UserError(
            f"{source} has no {component}/", expected="a model folder with transformer/, text_encoder/ and vae/"
        )
    return open_complete(path, component, job.files.file_bytes)


def _write_part(
    checkpoint: Checkpoint, folder: Path, source: Path, job: Job, meter: _Meter
) -> tuple[str, list[TensorError]]:
    """Convert or copy one component into `folder`; returns the name of its (first) weights file."""
    to = job.target_of(checkpoint.component)
    config = _config(checkpoint)
    if to is None and checkpoint.source != source:
        _write_json(folder / "config.json", config)
        is_folder = checkpoint.source.is_dir()
        found = weight_set(checkpoint.source) if is_folder else WeightSet((checkpoint.source,), False)
        for file in (*found.files, *filter(None, [found.index])):
            job.files.fetch(file)
            shutil.copyfile(file, folder / file.name)
            job.files.release(file)
        checkpoint.require_unchanged()
        meter(checkpoint.nbytes)
        return found.files[0].name, []
    to = to or as_it_is()  # out of an all-in-one file
    config.pop("quantization_config", None)
    _write_json(folder / "config.json", {**config, **quantization_config(to, output_tensors(checkpoint, to))})
    _note_lossy(checkpoint, to, job.note)
    standard = to.container in ("bnb", "quanto") or to.name == KEEP
    name = (_DIFFUSERS_NAMES[checkpoint.component] if standard else f"{checkpoint.component}-{to.name}") + to.suffix
    extra = _tokenizer_metadata(checkpoint, source, to)
    return name, _converted(checkpoint, to, folder / name, extra, job, meter)


def _converted(
    checkpoint: Checkpoint, to: Target, out: Path, extra: Mapping[str, Any], job: Job, meter: _Meter
) -> list[TensorError]:
    files = job.files if job.files.file_bytes else None  # else they are here all along
    return _convert.convert(checkpoint, to, out, extra=extra, options=job.options, files=files, on_bytes=meter)


def _expect(out: Path, sources: list[Checkpoint], out_bytes: int, job: Job) -> None:
    """Name the files that will be read, in order. Raises UserError if they and the output do not fit on the disk."""
    tensors = [
        [entry.path for tensor in source.tensors.values() for entry in tensor.parts.values()] for source in sources
    ]
    paths = [path for files in tensors for path in sorted(set(files))]
    job.files.expect(paths, out.resolve().parent, out_bytes)


def _note_lossy(checkpoint: Checkpoint, to: Target, note: Note) -> None:
    """Say that what a smaller format lost does not come back."""
    main = checkpoint.main_format
    encoded_again = any(
        part.format.lossy and part.format != tensor.format
        for tensor in output_tensors(checkpoint, to)
        for part in tensor.sources
    )
    if FORMATS[main].lossy and encoded_again:
        note(
            f"{checkpoint.component}: the source is {main} already, so {to.name} keeps its losses and adds its own; "
            "start from 16-bit weights where you can"
        )


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


def _tokenizer_metadata(checkpoint: Checkpoint, source: Path, to: Target) -> dict[str, Any]:
    """A text encoder in a GGUF file carries its tokenizer, when one is at hand."""
    if checkpoint.component != "text_encoder" or to.container != "gguf":
        return {}
    if "tokenizer.ggml.tokens" in checkpoint.metadata:
        return encoded_values(next(iter(checkpoint.tensors.values())).parts[""].path, "tokenizer.")
    folder = source / "tokenizer"
    if not folder.is_dir():
        return {}
    tokenizer: PromptTokenizer = tokenizer_from_folder(folder)
    return tokenizer_to_gguf(tokenizer, checkpoint.config.vocab_size)


def _source_bytes(checkpoint: Checkpoint, to: Target | None) -> int:
    """Bytes that will be read, which leaves out what no output needs."""
    if to is None:
        return checkpoint.nbytes
    return sum(part.nbytes for tensor in output_tensors(checkpoint, to) for part in tensor.sources)


def _estimate(checkpoint: Checkpoint, to: Target | None) -> int:
    """Bytes that the component will take on the disk, headers aside."""
    return checkpoint.nbytes if to is None else sum(tensor.nbytes for tensor in output_tensors(checkpoint, to))


class _Meter:
    """Adds up what several conversions report."""

    def __init__(self, progress: Progress, total_bytes: int) -> None:
        self.progress, self.total_bytes, self.done_bytes = progress, total_bytes, 0

    def __call__(self, n_bytes: int) -> None:
        self.done_bytes += n_bytes
        self.progress(self.done_bytes, self.total_bytes)
