"""zimage-lite compare REFERENCE QUANTIZED..."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from ..checkpoint.output import followed, replacing, require_absent
from ..config import GenerateOptions, RuntimeOptions
from ..errors import UserError
from ..pictures.saving import save
from ..units import ceiling
from . import files_meant, leaving_at_once, print_json, say
from .drawing_options import DRAWING_FIELDS
from .generate import command as generate
from .requests import requests_of, require_apart

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ..pipeline.drawing import Pipeline

_SHEET, _RESULT, _PICTURES = "sheet.png", "result.json", "pictures"
_AS_IN_GENERATE = {
    "prompt_file", "width", "height", "steps", "seed", "count", "guidance", "cfg", "negative", "shift", "loras", "vram",
    "ram", "device", "dtype", "backend", "compute", "as_json", *DRAWING_FIELDS,
}  # fmt: skip


@click.command(name="compare")
@click.argument("reference")
@click.argument("quantized", nargs=-1, required=True, metavar="QUANTIZED...")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="What to draw; as often as wanted.")
@click.option(
    "-o",
    "--output",
    "out",
    type=click.Path(path_type=Path),
    default=Path("compare.png"),
    show_default=True,
    help="PNG of all pictures side by side, the figures beside it in a .json; or a new folder, which gets both and "
    "every picture.",
)
def command(
    reference: str, quantized: tuple[str, ...], prompts: tuple[str, ...], prompt_file: Path | None, out: Path,
    count: int, vram: str | None, ram: str | None, device: str, dtype: str, backend: str, compute: str,
    as_json: bool, **image: Any,
) -> None:  # fmt: skip
    """Draw the same prompts and seeds with several models, and say how alike the pictures are.

    REFERENCE and each QUANTIZED are a model folder, an all-in-one file, a Hub id, demo or synthetic:FORMAT; QUANTIZED
    may also be a file of one component, which takes the others from REFERENCE. One model after the other gets all the
    memory. PSNR and SSIM of each picture, LPIPS if the package lpips is installed, seconds, peak memory and size of
    the files; `zimage-lite report` makes a table of the .json.
    """
    requests = requests_of(prompts, prompt_file, image, count)
    limits = {"vram_bytes": ceiling(vram), "ram_bytes": ceiling(ram)}
    options = RuntimeOptions(device, dtype, backend, cache=False, compute=compute, **limits)
    _require_place(out)
    require_apart([out, out.with_suffix(".json")], requests)
    with leaving_at_once():
        from ..compare.models import compare, opened, sheet
    from .progress import phase_progress

    pipelines = opened(reference, files_meant(quantized), options, say)
    if any(pipeline.model.synthetic for pipeline in pipelines.values()):
        say("note: random weights draw noise: time and memory are real, how alike the pictures are says nothing")
    with _work_folder(out) as folder:
        pictures = folder / _PICTURES
        result = compare(pipelines, requests, pictures, _save, say, phase_progress)
        _write(sheet(result, pictures), result, *_places(out, folder))
    if out.suffix.lower() == ".png":
        say(f"{out}  and {out.with_suffix('.json')}, for zimage-lite report")
    else:
        say(f"{out}  {_SHEET}, {_RESULT} for zimage-lite report, {_PICTURES}/")
    if as_json:
        print_json(result)


# The same options mean the same: their names, defaults and texts stand in generate.py alone.
command.params += [option for option in generate.params if option.name in _AS_IN_GENERATE]


def _save(path: Path, pixels: Tensor, request: GenerateOptions, pipeline: Pipeline) -> None:
    """With the model's hash if it is known: to compute it would disturb what is measured."""
    from ..checkpoint.hashes import FileHash

    known = FileHash(list(pipeline.model.transformer.stamps)).result()
    save(path, pixels, pipeline.recipe(request, pixels, known))


def _require_place(out: Path) -> None:
    """Raises UserError, before any work is done."""
    if out.suffix.lower() == ".png":
        for path in (out, out.with_suffix(".json")):
            if path.is_dir():
                raise UserError(f"{path} is a folder", fix="choose another name with -o")
    elif out.exists():
        raise UserError(f"{out} exists already", fix="choose the name of a new folder, or one that ends in .png")
    require_absent(out, overwrite=True)


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """Where pictures lie until all are compared: on the disk of the output, which is no memory."""
    if out.suffix.lower() == ".png":
        place = followed(out).parent
        with TemporaryDirectory(dir=place, prefix=".compare-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
        return
    with replacing(out) as folder:
        folder.mkdir()
        yield folder


def _places(out: Path, folder: Path) -> tuple[Path, Path]:
    """Of the sheet and of the result."""
    if out.suffix.lower() == ".png":
        return out, out.with_suffix(".json")
    return folder / _SHEET, folder / _RESULT


def _write(sheet: Image.Image, result: dict[str, Any], sheet_path: Path, result_path: Path) -> None:
    with replacing(sheet_path) as partial:
        sheet.save(partial, format="PNG")
    with replacing(result_path) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
