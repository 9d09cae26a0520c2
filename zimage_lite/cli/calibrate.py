"""zimage-lite calibrate MODEL -o STATS"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..checkpoint.model_card import DEMO, model_folder
from ..checkpoint.output import require_absent, require_outside
from ..config import BACKENDS, DEVICES, DTYPES, GenerateOptions, RuntimeOptions
from ..errors import UserError
from ..units import ceiling, counted, format_gb
from . import leaving_at_once, print_json, say
from .requests import lines_of, requests_of

if TYPE_CHECKING:
    from ..calibration.statistics import Statistics
    from ..checkpoint.model_files import ModelFiles
    from ..pipeline.drawing import Pipeline

_PATH = click.Path(path_type=Path)
_SUFFIXES = (".safetensors", ".gguf", ".dat")
_WHOLE, _NONE = "whole", "none"


class Width(click.ParamType):
    """A number of columns, whole or none."""

    name = "columns"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if value in (_WHOLE, _NONE):
            return 2**30 if value == _WHOLE else 0
        try:
            columns = int(value)
        except ValueError:
            columns = 0
        if columns < 1:
            self.fail(f"got {value!r}, expected a number of columns, {_WHOLE} or {_NONE}", param, ctx)
        return columns


@click.command(name="calibrate")
@click.argument("model", default=DEMO)
@click.option(
    "-o",
    "--output",
    "out",
    type=_PATH,
    required=True,
    help="File to write, not in the model's folder: .safetensors, or for llama.cpp's tools .gguf or .dat, an imatrix.",
)
@click.option(
    "--prompts",
    "prompt_file",
    type=_PATH,
    metavar="FILE",
    help="One prompt a line; .jsonl as generate takes it.  [default: 24 of ours, in English and Chinese]",
)
@click.option("--width", type=int, help="Of what is drawn.  [default: the model's own]")
@click.option("--height", type=int, help="[default: the model's own]")
@click.option("--steps", type=int, help="[default: the model's own]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the first prompt; the others count up.")
@click.option(
    "--products",
    type=Width(),
    metavar="COLUMNS|whole|none",
    help="Keep X^T X in blocks of so many columns, for quantize --effort best.  [default: the widest of "
    "whole rows, 1280 and 256 that takes no more than a quarter of the memory]",
)
@click.option("--vram", metavar="SIZE", help="Ceiling for the GPU's memory, such as 6GB.  [default: what is free]")
@click.option("--ram", metavar="SIZE", help="Ceiling for the process's memory, such as 8GB.  [default: what is free]")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True)
@click.option("--overwrite", is_flag=True, help="Begin anew, instead of adding the prompts that OUT lacks.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
def command(
    model: str, out: Path, prompt_file: Path | None, products: int | None, vram: str | None, ram: str | None,
    device: str, dtype: str, backend: str, seed: int, overwrite: bool, as_json: bool, **size: int | None,
) -> None:  # fmt: skip
    """Gather what MODEL's linears are given while it draws, for `quantize --calibration`.

    MODEL is a folder, an all-in-one file, a Hub id or demo, in any format; it streams within --vram and --ram. What
    was gathered is written now and then, whole: after Ctrl-C the file has the prompts until then, and the same command
    goes on with the others.
    """
    if out.suffix not in _SUFFIXES:
        raise UserError(f"{out}: its end says what it is", got=out.suffix or "none", expected=", ".join(_SUFFIXES))
    require_absent(out, overwrite or out.suffix == _SUFFIXES[0])
    requests = _requests(prompt_file, {"seed": seed, **size})
    vram_bytes, ram_bytes = ceiling(vram), ceiling(ram)
    runtime = RuntimeOptions(device, dtype, backend, vram_bytes, ram_bytes, compute="16bit")
    with leaving_at_once():
        from ..api import open_named
        from ..calibration import files as statistics_files
        from ..pipeline import calibrating
        from ..pipeline.drawing import Pipeline
    from .progress import phase_progress

    pipeline = Pipeline(open_named(model, {}), runtime, tell=lambda line: say(f"note: {line}"), advises=False)
    _require_apart(out, pipeline.model, model_folder(model), prompt_file)
    first = pipeline.complete(requests[0])
    settings = {name: getattr(first, name) for name in ("width", "height", "steps", "guidance", "shift")}
    found = calibrating.begun(pipeline, products, {"model": pipeline.model.name, **settings})
    if out.exists() and not overwrite:
        kept = statistics_files.resume(out)
        calibrating.require_like(kept, found, str(out))
        found = kept
    left = [request for request in requests if request.prompt not in found.prompts]
    with phase_progress("encode", "denoise") as progress:
        if left:
            calibrating.gather(pipeline, left, found, lambda: statistics_files.write(out, found), progress)
    _say_summary(pipeline, found, out)
    if as_json:
        print_json({"statistics": str(out), "bytes": out.stat().st_size, **found.coverage(), **_measured(pipeline)})


def _require_apart(out: Path, model: ModelFiles, place: Path, prompt_file: Path | None) -> None:
    """Raise UserError if `out` is one of the files that are read, or in a model's folder, of which weights that are
    no part of it would make another kind of folder."""
    parts = [part for part in (model.transformer, model.text_encoder, model.vae, model.siglip) if part is not None]
    read = {entry.path for part in parts for tensor in part.tensors.values() for entry in tensor.parts.values()}
    require_outside(out, [*sorted(read), *(part.source for part in parts), *filter(None, [prompt_file])])
    if place.exists():
        require_outside(out, [place])


def _requests(prompt_file: Path | None, base: dict[str, Any]) -> list[GenerateOptions]:
    """Seeds count up, so that each sees other noise."""
    base = {name: value for name, value in base.items() if value is not None}
    if prompt_file is not None and prompt_file.suffix == ".jsonl":
        return requests_of((), prompt_file, base, 1)
    own = files("zimage_lite.calibration") / "prompts.txt"
    lines = lines_of(prompt_file) if prompt_file else own.read_text(encoding="utf-8").split("\n")
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{prompt_file}: no prompt", expected="one a line")
    return [GenerateOptions(**{**base, "prompt": text, "seed": base["seed"] + i}) for i, text in enumerate(prompts)]


def _measured(pipeline: Pipeline) -> dict[str, Any]:
    from ..memory.meter import peak_rss_bytes

    seconds = pipeline.meter.phases.get("denoise", {}).get("seconds", 0)
    return {"seconds": seconds, "peak_rss_bytes": peak_rss_bytes()}


def _say_summary(pipeline: Pipeline, found: Statistics, out: Path) -> None:
    coverage, measured = found.coverage(), _measured(pipeline)
    images, quarters = coverage["image_tokens"], coverage["image_tokens_by_step_quarter"]
    shares = " ".join(f"{100 * count / images:.0f}%" for count in quarters)
    say(
        f"{out}: {format_gb(out.stat().st_size)}, {counted(len(found.prompts), 'prompt')}; seen: {images} tokens of "
        f"images, by quarter of the steps {shares}, and {coverage['caption_tokens']} of captions"
    )
    say(f"{measured['seconds']:.1f} s of drawing, peak memory {format_gb(measured['peak_rss_bytes'])}")
