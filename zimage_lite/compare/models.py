"""Reference against quantized: the same prompts and seeds through each model, one after the other, so that each has the
whole budget, and then picture against picture.

Pictures go to files as they are decoded, and are compared two at a time when no weights are in memory. The text encoder
runs for every model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from statistics import mean, median
from typing import Any

from PIL import Image
from torch import Tensor

from .. import __version__
from ..api import open_named
from ..bench.machine import commit, machine_facts
from ..checkpoint.checkpoint import components_in
from ..checkpoint.detect import COMPONENTS
from ..checkpoint.model_card import model_folder
from ..checkpoint.model_files import ModelFiles
from ..config import GenerateOptions, RuntimeOptions
from ..errors import UserError, WrongModelError
from ..memory.machine import CUDA_CONTEXT_BYTES
from ..pipeline.drawing import Pipeline
from ..pipeline.workspace import Progress
from ..units import format_gb
from .contact_sheet import Row, contact_sheet
from .likeness import NAMES, said
from .section import COMPARE
from .similarity import Distance, large_enough_for_lpips, open_lpips, pixels, psnr_db, ssim

SHEET_ROWS = 32  # more prompts than these: the ones that came out least alike
_SIZES = ("dim", "n_layers", "n_refiner_layers", "n_heads", "in_channels", "cap_feat_dim")

Save = Callable[[Path, Tensor, GenerateOptions, Pipeline], None]
Tell = Callable[[str], None]
Watch = Callable[[], AbstractContextManager[Progress]]


def opened(reference: str, others: Sequence[str], options: RuntimeOptions, tell: Tell) -> dict[str, Pipeline]:
    """-> label, which is good for a folder's name, -> model, the reference first. Nothing is loaded.

    others: as MODEL on the command line, or a file of one component, which takes the others from the reference. tell:
    takes a line for the user. Raises UserError for what cannot be opened, is named twice, or is another model than the
    reference.
    """
    places = list[Path]()
    for name in (reference, *others):
        places.append(model_folder(name).resolve())
        if places[-1] in places[:-1]:
            raise UserError(f"{name}: named twice", fix="name models that differ")
    first = open_named(reference, {})
    found = {_label(first.name, ()): first}
    for name in others:
        files = _open(name, reference)
        _require_same_sizes(files, first)
        found[_label(files.name, found)] = files
    return {
        label: Pipeline(files, options, partial(_told_of, tell, label), advises=files is first)
        for label, files in found.items()
    }


def _told_of(tell: Tell, label: str, line: str) -> None:
    tell(f"note: {label}: {line}")


def _open(name: str, reference: str) -> ModelFiles:
    path = Path(name)
    parts = components_in(path) if path.is_file() else ()
    if len(parts) != 1 or parts[0] not in COMPONENTS:
        return open_named(name, {})
    return replace(open_named(reference, {parts[0]: path}), name=path.name)


def _label(name: str, taken: Iterable[str]) -> str:
    """Some disks do not tell q8_0 from Q8_0."""
    label, known = re.sub(r"[^\w.+-]+", "-", name), {one.casefold() for one in taken}
    return next(one for one in chain([label], (f"{label}-{n}" for n in count(2))) if one.casefold() not in known)


def _require_same_sizes(files: ModelFiles, first: ModelFiles) -> None:
    for name in _SIZES:
        got, expected = (getattr(each.transformer.config, name) for each in (files, first))
        if got != expected:
            raise WrongModelError(
                f"{files.transformer.source}: {name} of the transformer",
                got=got,
                expected=f"{expected}, as {first.name} has",
                fix="compare formats of one model",
            )


def compare(
    pipelines: Mapping[str, Pipeline], requests: Sequence[GenerateOptions], folder: Path, save: Save, tell: Tell,
    watch: Watch,
) -> dict[str, Any]:  # fmt: skip
    """Draw and compare. -> the result as plain data; pictures are in folder/LABEL/.

    requests: what they leave open, the reference says for all. save: writes a picture; tell: takes a line for the user;
    watch: a progress display for one model. Raises UserError, BudgetError before anything is drawn.
    """
    distance, lpips = open_lpips()
    if distance is None:
        tell(f"note: LPIPS is left out: {lpips}")
    first = next(iter(pipelines.values()))
    requests = [first.complete(request) for request in requests]
    for label, pipeline in pipelines.items():  # before an hour was spent on the first
        with _named(label):
            pipeline.require_fit(requests)
    rows, sizes = list[dict[str, Any]](), dict[int, list[int]]()
    for label, pipeline in pipelines.items():
        (folder / label).mkdir(parents=True)
        with _named(label), watch() as progress:
            for index, image in pipeline.images(requests, progress):
                save(picture_path(folder / label, index), image, requests[index], pipeline)
                sizes[index] = [image.shape[1], image.shape[0]]
        row = {"label": label, **_facts(pipeline.model), **measured(pipeline, len(requests))}
        if rows:
            row["alike"] = _alike(folder / rows[0]["label"], folder / label, len(requests), distance)
        rows.append(row)
        tell(told(row))
    return {
        "kind": COMPARE,
        "version": __version__,
        "commit": commit(),
        "machine": machine_facts(),
        "steps": requests[0].steps,
        "lpips": lpips,
        "images": [{**_asked(request, first), "size": sizes[i]} for i, request in enumerate(requests)],
        "models": rows,
    }


@contextmanager
def _named(label: str) -> Iterator[None]:
    """Errors say which model they are about."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{label}: {error}") from error


def _asked(request: GenerateOptions, pipeline: Pipeline) -> dict[str, Any]:
    beside = {"loras": pipeline.adapters.told(request.loras), "controls": pipeline.controls.told(request)}
    return {"prompt": request.prompt, "seed": request.seed, **beside}


def _facts(files: ModelFiles) -> dict[str, Any]:
    return {
        "format": files.transformer.main_format,
        "text_encoder_format": files.text_encoder.main_format,
        "synthetic": files.synthetic,
        "bytes": _stored_bytes(files),
    }


def measured(pipeline: Pipeline, images: int) -> dict[str, Any]:
    """What drawing took, as the meter says: saving and comparing are not in it. GPU memory: what the allocator took,
    and the CUDA context as it is planned."""
    phases, steps = pipeline.meter.phases, list(pipeline.meter.step_seconds)
    seconds = sum(phase["seconds"] for phase in phases.values())
    reserved = max(phase.get("peak_reserved_bytes", 0) for phase in phases.values())
    return {
        **pipeline.computes_with(),
        "seconds": round(seconds, 3),
        "seconds_per_image": round(seconds / images, 4),
        "step_seconds": median(steps[1:] or steps),  # the first one loads
        "peak_rss_bytes": max(phase["peak_rss_bytes"] for phase in phases.values()),
        "peak_vram_bytes": reserved + CUDA_CONTEXT_BYTES if reserved else None,
        "planned_rss_bytes": max(plan.peak_ram_bytes for plan in pipeline.plans.values()),
    }


def picture_path(folder: Path, index: int) -> Path:
    return folder / f"{index + 1:04d}.png"


def _stored_bytes(files: ModelFiles) -> int:
    """Of the files that hold the weights, each counted once; of weights made in memory, what a file would take."""
    parts = (files.transformer, files.text_encoder, files.vae)
    sizes = {path: stamp[0] for part in parts for path, stamp in part.stamps.items()}
    return sum(sizes.values()) + sum(part.nbytes for part in parts if not part.stamps)


def _alike(reference: Path, other: Path, images: int, distance: Distance | None) -> dict[str, dict[str, Any]]:
    each: dict[str, list[float | None]] = {"psnr_db": [], "ssim": [], "lpips": []}
    for index in range(images):
        a, b = (_saved(picture_path(folder, index)) for folder in (reference, other))
        each["psnr_db"].append(round(psnr_db(a, b), 2))
        each["ssim"].append(round(ssim(a, b), 5))
        apart = distance(a, b) if distance and large_enough_for_lpips(*a.shape[:2]) else None
        each["lpips"].append(None if apart is None else round(apart, 5))
    worst = {"psnr_db": min, "ssim": min, "lpips": max}
    there = {name: [value for value in values if value is not None] for name, values in each.items()}
    return {
        name: {"mean": round(mean(values), 5), "worst": worst[name](values), "each": each[name]}
        for name, values in there.items()
        if values
    }


def _saved(path: Path) -> Tensor:
    with Image.open(path) as picture:
        return pixels(picture)


def told(row: Mapping[str, Any]) -> str:
    """A line for people."""
    vram = f", {row['peak_vram_bytes'] / 2**30:.2f} GiB of GPU memory" if row["peak_vram_bytes"] else ""
    start = (
        f"{row['label']:<20} {row['format']:<8} {format_gb(row['bytes']):>9}  {row['seconds_per_image']:.2f} s an "
        f"image, {format_gb(row['peak_rss_bytes'])} of RAM{vram}"
    )
    if "alike" not in row:
        return f"{start}: the reference"
    figures = [
        f"{NAMES[name]} {said(name, one['mean'])} (worst {said(name, one['worst'])})"
        for name, one in row["alike"].items()
    ]
    return f"{start}: {', '.join(figures)}"


def sheet(result: Mapping[str, Any], folder: Path) -> Image.Image:
    """The contact sheet of a result whose pictures lie in `folder`."""
    rows, models, images = list[Row](), result["models"], result["images"]
    chosen: Sequence[int] = range(len(images))
    if len(images) > SHEET_ROWS:
        worst = [min(model["alike"]["psnr_db"]["each"][i] for model in models[1:]) for i in chosen]
        chosen = sorted(sorted(chosen, key=worst.__getitem__)[:SHEET_ROWS])
    for index in chosen:
        one = images[index]
        rows.append(
            Row(
                f"{index + 1}. seed {one['seed']}: {one['prompt']}",
                tuple(one["size"]),
                [picture_path(folder / model["label"], index) for model in models],
                [_note(model, index) for model in models],
            )
        )
    heads = [(model["label"], f"{model['format']}, {format_gb(model['bytes'])}") for model in models]
    return contact_sheet(heads, rows)


def _note(model: Mapping[str, Any], index: int) -> str:
    if "alike" not in model:
        return "reference"
    figures = ((name, one["each"][index]) for name, one in model["alike"].items())
    return ", ".join(f"{NAMES[name]} {said(name, value)}" for name, value in figures if value is not None)
