"""zimage-lite bench"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..bench.harness import MIN_REPEATS, REPEATS, Request, bench
from ..bench.tiers import SIZES, TIERS, find_tier
from ..config import SIZE_MULTIPLE
from ..errors import UserError
from . import leaving_at_once, print_json, say

_SIZES = ",".join(map(str, SIZES))


@click.command(name="bench")
@click.option("--tier", metavar="|".join(TIERS), help="Hold this GPU to what such a card has free, or predict for one.")
@click.option(
    "--model", help="Folder, file, Hub id, demo, or synthetic:FORMAT.  [default: a tier's formats; else demo]"
)
@click.option("--formats", metavar="A,B,...", help="synthetic: weights of these formats.  [default: the tier's]")
@click.option("--sizes", metavar="W,W,...", help=f"Pixels each way.  [default: {_SIZES}; else the model's]")
@click.option("--repeats", type=int, default=REPEATS, show_default=True, help="Warm runs, after a cold one.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE.json", help="Written after each case.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
def command(
    tier: str | None, model: str | None, formats: str | None, sizes: str | None, repeats: int, out: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure time and memory, or predict them for a card that is not here.

    With --tier on a GPU that is at least as large, memory is held to the tier's; compute and link speed are its own.
    Without such a GPU the tier is planned, and called a prediction. Without --tier: this machine as it is.
    """
    if model and formats:
        raise UserError("--formats is for random weights", fix="leave it out, a --model has its own")
    if repeats < MIN_REPEATS:
        raise UserError("--repeats", got=repeats, expected=f"at least {MIN_REPEATS}")
    chosen = find_tier(tier) if tier else None
    wanted = [_size(text) for text in sizes.split(",")] if sizes else []
    with leaving_at_once():
        from ..checkpoint.output import replacing, require_absent
        from ..convert.recipe import target
    names = [target(name.strip(), "--formats").name for name in formats.split(",")] if formats else []
    if out:
        require_absent(out, overwrite=True)

    def save(result: dict[str, Any]) -> None:
        if out:
            with replacing(out) as partial:
                partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    result = bench(Request.of(chosen, model, names, wanted, repeats), say, save)
    save(result)
    if out:
        say(f"{out}  for zimage-lite report")
    if as_json:
        print_json(result)


def _size(text: str) -> int:
    try:
        pixels = int(text)
    except ValueError:
        pixels = 0
    if pixels < SIZE_MULTIPLE or pixels % SIZE_MULTIPLE:
        raise UserError("--sizes", got=repr(text), expected=f"multiples of {SIZE_MULTIPLE}, such as 512,1024")
    return pixels
