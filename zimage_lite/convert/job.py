"""What `quantize` was asked for, and what each checkpoint of it goes through: refusals, the disk, the converter."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path

from ..adapters.library import place_of
from ..adapters.reading import file_of
from ..calibration.known import Calibration
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.detect import KINDS, VISION, said_of_unused
from ..checkpoint.hub import LocalFiles
from ..checkpoint.output import clear_leftovers, lies_in, require_absent, require_apart, require_outside
from ..checkpoint.weight_files import ADAPTER_CONFIG
from ..config import Lora
from ..errors import UserError
from ..model.transformer import is_time_weight
from ..quant.formats import FORMATS
from . import streaming
from .allocation import allocated
from .fidelity import TensorError
from .output_file import output_tensors, require_overrides_fit
from .recipe import Target, target, targets
from .tokenizers import tokenizer_metadata

Progress = Callable[[int, int], None]  # source bytes done, in all
Note = Callable[[str], None]  # a line for people
Part = tuple[Checkpoint, Target | None]  # what is read, and what becomes of it; None: it is copied as it is


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
    options: streaming.Options = field(default_factory=streaming.Options)
    overwrite: bool = False
    progress: Progress = lambda done, total: None
    note: Note = lambda line: None
    files: LocalFiles = field(default_factory=lambda: LocalFiles(Path()))
    loras: Sequence[Lora] = ()  # merged into the transformer
    statistics: Path | None = None  # the file of options.calibration
    report: Path | None = None  # what the caller writes beside, in the end

    def settled(self, transformer: Checkpoint) -> Job:
        """With a target that says what each tensor gets. Raises UserError."""
        if self.target.goal is None or transformer.component == "text_encoder":
            return self
        if transformer.component != "transformer":
            raise UserError(f"--to {self.target.name} is for the transformer", got=f"a {KINDS[transformer.component]}")
        if self.files.file_bytes:
            raise UserError(f"--to {self.target.name} measures the weights first", fix="download the model before")
        told = partial(self.note, "measuring what each of the transformer's tensors loses in each type")
        return replace(self, target=allocated(self.target, transformer, self.options, self.progress, told))

    def target_of(self, component: str) -> Target | None:
        if component in ("vae", VISION):
            return None
        return self.target if component == "transformer" else self.text_encoder


class Meter:
    """Adds up what several conversions report."""

    def __init__(self, progress: Progress, total_bytes: int) -> None:
        self.progress, self.total_bytes, self.done_bytes = progress, total_bytes, 0

    def __call__(self, n_bytes: int) -> None:
        self.done_bytes += n_bytes
        self.progress(self.done_bytes, self.total_bytes)


def source_name(source: Path) -> str:
    """What outputs are called after."""
    return source.stem if source.is_file() else source.resolve().name


def prepare(out: Path, sources: Sequence[Checkpoint], job: Job) -> None:
    """All that can be refused before anything is written, and what an earlier, killed run left behind."""
    require_absent(out, job.overwrite)
    outputs = _require_outputs_apart(out, sources, job)
    require_overrides_fit(job.target, sources[0])
    if job.options.calibration:
        if not job.target.calibrated:
            fits = ", ".join(name for name in targets() if target(name).calibrated)
            raise UserError("--calibration: not a format that is chosen by it", got=job.target.name, expected=fits)
        _require_statistics_of(sources[0], job.options.calibration)
    for leftover in (leftover for output in outputs for leftover in clear_leftovers(output)):
        job.note(f"an earlier run was killed before it had finished: {leftover.name} was cleared away")
    require_absent(out, job.overwrite)  # again, for an old folder may have come back


_IN_BLOCK = re.compile(r"(?:layers|refiner)\.\d+\.")


def _require_outputs_apart(out: Path, sources: Sequence[Checkpoint], job: Job) -> list[Path]:
    """Returns what will be written. Raises UserError if one would replace an input, or another."""
    repair = job.options.repair.out if job.options.repair else None
    given = {"-o": out, "--repair": repair, "--report": job.report}
    outputs = {flag: path for flag, path in given.items() if path is not None}
    places = [place_of(lora.path) for lora in job.loras]
    adapters = [file_of(place) for place in places]
    read = [*adapters, *(file for source in sources for file in _files_read(source))]
    read += [job.statistics] if job.statistics else []
    for flag, path in outputs.items():
        require_apart(path, read, flag)
    if job.report:  # any name will do for it, so also that of a config
        configs = [file.with_name(ADAPTER_CONFIG) for file in adapters]
        require_outside(job.report, [job.files.path, *places, *configs], "--report")
    for (_, first), (flag, second) in combinations(outputs.items(), 2):
        if lies_in(second, first):
            raise UserError(f"{second}: lies in the output {first}", fix=f"choose another name with {flag}")
    return list(outputs.values())


def _require_statistics_of(checkpoint: Checkpoint, calibration: Calibration) -> None:
    """Raise UserError unless these statistics are of such a transformer."""
    if checkpoint.component != "transformer":
        raise UserError("--calibration is for the transformer", got=f"a {KINDS[checkpoint.component]}")
    columns = {name: tensor.columns for name, tensor in checkpoint.tensors.items()}
    calibration.require_fits(asdict(checkpoint.config), columns)


def _note_unknown(checkpoint: Checkpoint, calibration: Calibration, note: Note) -> None:
    """Say how many linears of blocks were made without statistics."""
    linears = [
        name for name, tensor in checkpoint.tensors.items()
        if _IN_BLOCK.search(name) and name.endswith(".weight") and tensor.rows > 1 and not is_time_weight(name)
    ]  # fmt: skip
    unknown = [name for name in linears if not calibration.inputs_known(name)]
    if unknown:
        note(f"the statistics know nothing of {len(unknown)} of {len(linears)} linears in blocks, {unknown[0]} first")


def _files_read(checkpoint: Checkpoint) -> list[Path]:
    return sorted({entry.path for tensor in checkpoint.tensors.values() for entry in tensor.parts.values()})


def expect(out: Path, parts: Sequence[Part], job: Job) -> Meter:
    """Name the files that will be read, in order. Returns what counts their bytes as they are converted. Raises
    UserError if they and the output do not fit on the disk."""
    files = [file for checkpoint, _ in parts for file in _files_read(checkpoint)]
    job.files.expect(files, out.resolve().parent, sum(_out_bytes(*part) for part in parts))
    return Meter(job.progress, sum(_source_bytes(*part) for part in parts))


def convert_part(
    checkpoint: Checkpoint, to: Target, out: Path, source: Path, job: Job, meter: Meter
) -> list[TensorError]:
    """Write `out`, from a checkpoint that is `source` or in it; returns each tensor's error, if they are measured."""
    _note_losses(checkpoint, to, job.note)
    extra = tokenizer_metadata(checkpoint, source, to)
    files = job.files if job.files.file_bytes else None  # else they are here all along
    errors = streaming.convert(checkpoint, to, out, extra=extra, options=job.options, files=files, on_bytes=meter)
    if job.options.calibration and checkpoint.component == "transformer":
        _note_unknown(checkpoint, job.options.calibration, job.note)
    return errors


def _note_losses(checkpoint: Checkpoint, to: Target, note: Note) -> None:
    """Say what is left out, and that what a smaller format lost does not come back."""
    if checkpoint.unused:
        note(f"{checkpoint.component}: left out what the model has no use for: {said_of_unused(checkpoint.unused)}")
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


def _source_bytes(checkpoint: Checkpoint, to: Target | None) -> int:
    """Bytes that will be read, which leaves out what no output needs."""
    if to is None:
        return checkpoint.nbytes
    return sum(part.nbytes for tensor in output_tensors(checkpoint, to) for part in tensor.sources)


def _out_bytes(checkpoint: Checkpoint, to: Target | None) -> int:
    """Bytes that the component will take on the disk, headers aside."""
    return checkpoint.nbytes if to is None else sum(tensor.nbytes for tensor in output_tensors(checkpoint, to))
