"""zimage-lite quantize SOURCE --to FORMAT"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from ..checkpoint.hub import is_hub_id
from ..checkpoint.model_card import model_folder
from ..config import REPAIR_RANK, Lora
from ..convert.recipe import targets
from ..quant.formats import EFFORTS
from ..units import format_gb
from . import print_json, say

WORST = 5  # tensors that --verify names


@click.command(name="quantize")
@click.argument("source")
@click.option(
    "-o",
    "--output",
    "out",
    type=click.Path(path_type=Path),
    help="Folder or file to write.  [default: SOURCE-FORMAT here]",
)
@click.option(
    "--to",
    required=True,
    metavar="FORMAT",
    help=f"One of {', '.join(targets())}; see zimage-lite formats. auto:4.5bpw or auto:3.6GB: a transformer of that "
    "size, each of its tensors in the GGUF type that pays there.",
)
@click.option(
    "--text-encoder-to", metavar="FORMAT", help="The text encoder's format, or keep.  [default: one of the same size]"
)
@click.option(
    "--component",
    type=click.Choice(["all", "transformer", "text_encoder"]),
    default="all",
    show_default=True,
    help="Write only this part, as a file.",
)
@click.option(
    "--keep", multiple=True, metavar="PATTERN", help='Leave these transformer tensors in 16 bits, e.g. "layers.29.*".'
)
@click.option(
    "--tensor", "tensors", multiple=True, metavar="PATTERN=FORMAT", help='Another format for these, e.g. "*.w2.*=q6_k".'
)
@click.option(
    "--effort",
    type=click.Choice(EFFORTS),
    default="reference",
    show_default=True,
    help="How hard to search for scales: reference gives ggml's own bytes, best a smaller error.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Statistics that `zimage-lite calibrate` gathered, or an imatrix: errors count as the transformer's inputs "
    "make them count. best also makes up for each column's error in the others. For GGUF types, int8, int4 and nf4.",
)
@click.option(
    "--repair",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a LoRA beside, .safetensors, that takes back part of what quantizing makes wrong, for generate --lora. "
    "Needs --calibration.",
)
@click.option("--repair-rank", type=click.IntRange(1), help=f"Of that LoRA.  [default: {REPAIR_RANK}]")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to do the arithmetic.",
)
@click.option("--verify", is_flag=True, help="Read everything back, compare it, and name the worst tensors.")
@click.option(
    "--report",
    "report_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Print the error per group of tensors, and write it to FILE as JSON.",
)
@click.option(
    "--merge-lora",
    "merge_loras",
    multiple=True,
    metavar="PATH[:STRENGTH]",
    help="Make this LoRA part of the transformer, before it is quantized. Once for each.",
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a model on the Hub.  [default: main]")
@click.option(
    "--discard-source", is_flag=True, help="Keep one file of a model on the Hub at a time, and none in the end."
)
@click.option("--overwrite", is_flag=True, help="Replace existing outputs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
def command(
    source: str,
    out: Path | None,
    to: str,
    device: str,
    verify: bool,
    report_file: Path | None,
    merge_loras: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Turn a checkpoint into a smaller one.

    SOURCE is a model folder, an all-in-one file, the id of a model on the Hugging Face Hub (or demo), or a single
    transformer, text encoder or ControlNet file; a model comes out as a folder, a file as a file. The output appears
    whole or not at all. `zimage-lite formats` explains FORMAT.
    """
    from ..convert.quantize import quantize
    from ..memory.meter import peak_rss_bytes
    from .progress import byte_progress

    start = time.perf_counter()
    with byte_progress(f"to {to}", "download") as (progress, downloaded):
        written = quantize(
            source if is_hub_id(source) else model_folder(source),
            out,
            to,
            device="cpu" if device == "auto" else device,  # reading and writing bound it, not the arithmetic
            report=report_file,
            verify=verify,
            merge_loras=Lora.several(merge_loras),
            progress=progress,
            downloaded=downloaded,
            note=lambda line: say(f"note: {line}"),
            **options,
        )
    seconds = time.perf_counter() - start
    for part in written:
        sizes = f"{format_gb(part.source_bytes)} -> {format_gb(part.bytes)}"
        say(f"{part.component:<13} {part.format:<8} {sizes}  {part.path}")
    if verify:
        _say_worst(written)
    reports = _reports(written) if report_file is not None or verify else {}
    if report_file is not None:
        _say_table(reports)
        _write_whole(report_file, {"to": to, "effort": options["effort"], "components": reports})
    say(f"{seconds:.1f} s, peak memory {format_gb(peak_rss_bytes())}")
    if as_json:
        parts = [
            {name: str(value) if name == "path" else value for name, value in vars(part).items() if name != "errors"}
            for part in written
        ]
        errors = {"errors": reports} if reports else {}
        print_json(
            {"written": parts, "seconds": round(seconds, 2), "peak_rss_bytes": peak_rss_bytes(), **errors},
        )


def _reports(written: list[Any]) -> dict[str, Any]:
    from ..convert.fidelity import report

    return {part.component: report(part.errors) for part in written if part.errors}


def _say_worst(written: list[Any]) -> None:
    """All tensors were read back; these lost the most."""
    for part in written:
        lossy = sorted(part.errors, key=lambda error: -error.sums.relative_rmse)
        if lossy:
            say(f"{part.component}: {len(lossy)} tensors read back as they were written; the largest errors:")
        for error in lossy[:WORST]:
            say(f"    {error.sums.relative_rmse:.5f}  cosine {error.sums.cosine:.6f}  {error.format:<7} {error.name}")


def _say_table(reports: dict[str, Any]) -> None:
    for component, found in reports.items():
        say(f"{component:<20} {'tensors':>7} {'size':>10} {'bits':>6} {'rel. RMSE':>10} {'cosine':>10}  formats")
        for group, row in {**found["groups"], "all": found["all"]}.items():
            say(
                f"  {group:<18} {row['tensors']:>7} {format_gb(row['bytes']):>10} {row['bits_per_weight']:>6.2f} "
                f"{row['relative_rmse']:>10.5f} {row['cosine']:>10.6f}  {' '.join(row['formats'])}"
            )


def _write_whole(path: Path, content: dict[str, Any]) -> None:
    from ..checkpoint.output import replacing

    with replacing(path, "--report") as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
