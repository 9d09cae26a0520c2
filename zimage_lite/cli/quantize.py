"""zimage-lite quantize SOURCE --to FORMAT"""

from __future__ import annotations

import time
from pathlib import Path

import click

from ..checkpoint.model_card import model_folder
from ..quant.formats import TARGETS
from ..units import format_gb
from . import print_json, say


@click.command(name="quantize")
@click.argument("source")
@click.option(
    "-o",
    "--output",
    "out",
    type=click.Path(path_type=Path),
    help="Folder or file to write.  [default: SOURCE-FORMAT here]",
)
@click.option("--to", required=True, metavar="FORMAT", help=f"One of {', '.join(TARGETS)}.")
@click.option(
    "--text-encoder-to", metavar="FORMAT", help="The text encoder's format, or keep.  [default: one of the same size]"
)
@click.option(
    "--component",
    type=click.Choice(["all", "transformer", "text_encoder", "vae"]),
    default="all",
    show_default=True,
    help="Write only this part, as a file.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to do the arithmetic.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
def command(
    source: str,
    out: Path | None,
    to: str,
    text_encoder_to: str | None,
    component: str,
    device: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Turn a checkpoint into a smaller one.

    SOURCE is a model folder (or demo), or a single transformer or text encoder file; the output is of the same kind.
    q8_0 and q4_0 give GGUF files, int8 gives ComfyUI's safetensors. The output appears whole or not at all.
    """
    from ..conversion import quantize
    from ..memory.meter import peak_rss_bytes
    from .progress import byte_progress

    start = time.perf_counter()
    with byte_progress(f"to {to}") as progress:
        written = quantize(
            model_folder(source),
            out,
            to,
            text_encoder_to=text_encoder_to,
            component=component,
            device="cpu" if device == "auto" else device,  # reading and writing bound it, not the arithmetic
            overwrite=overwrite,
            progress=progress,
        )
    seconds = time.perf_counter() - start
    for part in written:
        sizes = f"{format_gb(part.source_bytes)} -> {format_gb(part.bytes)}"
        say(f"{part.component:<13} {part.format:<5} {sizes}  {part.path}")
    say(f"{seconds:.1f} s, peak memory {format_gb(peak_rss_bytes())}")
    if as_json:
        parts = [{**vars(part), "path": str(part.path)} for part in written]
        print_json({"written": parts, "seconds": round(seconds, 2), "peak_rss_bytes": peak_rss_bytes()})
