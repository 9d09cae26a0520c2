"""`quantize` for whatever the user has: one file, one component of a model, or a whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ..calibration.files import read as read_statistics
from ..checkpoint.checkpoint import components_in
from ..checkpoint.detect import COMPONENTS, KINDS, VISION
from ..checkpoint.hub import LocalFiles, hub_files, is_hub_id
from ..checkpoint.impostors import no_such
from ..checkpoint.model_files import find_component
from ..checkpoint.output import require_absent
from ..checkpoint.weight_files import WEIGHT_SUFFIXES, is_weight_file
from ..config import Lora
from ..errors import UserError
from ..quant.formats import EFFORTS
from .complete import open_complete
from .job import Job, Note, Progress, Written, convert_part, expect, prepare, source_name
from .merging import with_merged
from .model_folder import quantize_model
from .recipe import KEEP, overridden, target
from .repair import repairing
from .streaming import Options


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
    calibration: Path | None = None,
    repair: Path | None = None,
    repair_rank: int | None = None,
    device: str = "cpu",
    measure: bool = False,
    report: Path | None = None,
    verify: bool = False,
    revision: str | None = None,
    discard_source: bool = False,
    overwrite: bool = False,
    merge_loras: Sequence[Lora] = (),
    progress: Progress = lambda done, total: None,
    downloaded: Callable[[int], None] = lambda n_bytes: None,
    note: Note = lambda line: None,
) -> list[Written]:
    """Convert `source`, a weights file or a model, and return what was written. Raises UserError.

    source: a path, or as text the id of a model on the Hub; then revision is a branch, tag or commit, discard_source
    keeps one of its files at a time and none in the end, and downloaded is told of bytes.

    out: default is the source's name with the format added, in the current folder. keep: patterns of tensors that stay
    16-bit; tensors: PATTERN=FORMAT; of a model, both are about its transformer. calibration: statistics, or an
    imatrix, that errors in the transformer are weighed by. repair: a file for a LoRA of repair_rank, by default
    `REPAIR_RANK`, that takes back part of them. merge_loras: adapters that become part of the transformer.
    measure: decode everything again and compare; verify: read it back as well. report: where the caller will write what
    was measured; it may replace no more than other outputs may.
    """
    chosen = overridden(target(to), keep, tensors)
    encoder = text_encoder_to or chosen.text_encoder_to
    part = target(encoder, "--text-encoder-to", also=(KEEP,)) if encoder != KEEP else None
    _require(effort, device)
    for flag, file in (("-o", out), ("--report", report)):
        if file is not None:
            require_absent(file, overwrite, flag)
    known = read_statistics(calibration) if calibration else None
    parts = tuple(COMPONENTS) if component == "all" else (component,)
    with (
        repairing(repair, repair_rank, known is not None, overwrite) as beside,
        _files(source, revision, discard_source, out, parts, downloaded) as files,
    ):
        options = Options(device, effort, measure or verify or report is not None, verify, known, beside)
        job = Job(chosen, part, options, overwrite, progress, note, files, merge_loras, calibration, report)
        single = _single_file(files.path, component)
        if single is None:
            return _told(quantize_model(files.path, out, job), job)
        if component == "text_encoder" and text_encoder_to not in (None, KEEP, to):
            raise UserError(
                "--to and --text-encoder-to disagree", fix="with --component text_encoder, name one of them"
            )
        return _told([_quantize_file(single, out, files.path, None if component == "all" else component, job)], job)


def _require(effort: str, device: str) -> None:
    """Raise UserError for what there is not."""
    if effort not in EFFORTS:
        raise UserError("--effort", got=repr(effort), expected=", ".join(EFFORTS))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device cuda: torch {torch.__version__} sees no such device", fix="use --device cpu")


def _told(written: list[Written], job: Job) -> list[Written]:
    if job.options.repair is not None:
        job.note(job.options.repair.told())
    return written


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
    if checkpoint.component in ("vae", VISION):
        raise UserError(
            f"{path}: a {KINDS[checkpoint.component]} stays as it is",
            fix="quantize the transformer and the text encoder",
        )
    if job.loras and checkpoint.component != "transformer":
        raise UserError("--merge-lora is for the transformer", got=f"a {KINDS[checkpoint.component]}")
    checkpoint = with_merged(checkpoint, job.loras, job.note, not job.files.file_bytes)
    suffix = job.target.suffix
    part = "" if component is None and path == source else f"-{checkpoint.component}"
    out = out or Path(f"{source_name(source)}{part}-{job.target.name}{suffix}")
    if out.is_dir():
        raise UserError(f"{out} is a folder", fix="name the file to write with -o")
    if out.suffix in WEIGHT_SUFFIXES and out.suffix != suffix:
        raise UserError(
            f"{out}: other programs go by the name's end", got=out.suffix, expected=f"{suffix} for {job.target.name}"
        )
    prepare(out, [checkpoint], job)
    job = job.settled(checkpoint)
    meter = expect(out, [(checkpoint, job.target)], job)
    errors = convert_part(checkpoint, job.target, out, source, job, meter)
    return Written(checkpoint.component, job.target.name, out, checkpoint.nbytes, out.stat().st_size, errors)
