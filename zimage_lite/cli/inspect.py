"""zimage-lite inspect FILE_OR_FOLDER"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..checkpoint.detect import said_of_unused
from ..checkpoint.model_card import model_folder
from ..config import TransformerConfig
from ..units import format_gb
from . import print_json, table_printer

RULES = 4  # of a recipe that are shown


@click.command(name="inspect")
@click.argument("path", metavar="FILE_OR_FOLDER")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
def command(path: str, as_json: bool) -> None:
    """Say what a file or folder is: model, layout, formats by tensor count and bytes, what would be refused and why; of
    a LoRA, who wrote it, its kind and ranks, and how many modules it changes; of a ControlNet, its version and what its
    authors run it with.

    Reads headers only.
    """
    from ..adapters.describe import is_adapter_path
    from ..convert.inspection import inspect

    if Path(path).exists() and is_adapter_path(Path(path)):
        _adapter(Path(path), as_json)
        return
    report = inspect(model_folder(path))
    for part in report:
        _describe(part, table_printer(as_json))
    if as_json:
        print_json({"path": path, "parts": [_as_json(part) for part in report]})
    if any(part.refusal for part in report):
        raise click.exceptions.Exit(2)


def _adapter(path: Path, as_json: bool) -> None:
    from ..adapters.describe import describe, lines
    from ..checkpoint.checkpoint import open_checkpoint
    from ..checkpoint.model_card import DEMO

    demo = open_checkpoint(model_folder(DEMO) / "transformer").config
    found = describe(path, {"Z-Image": TransformerConfig(), "the demo": demo})
    for line in lines(found):
        table_printer(as_json)(line)
    if as_json:
        print_json({"path": str(path), "adapter": found.facts()})


def _describe(part: Any, say: Callable[[str], None]) -> None:
    if part.refusal is not None:
        say(f"{part.name}: refused: {part.refusal}")
        return
    say(f"{part.name}: {part.model}, {part.layout}, {part.tensors} tensors, {format_gb(part.bytes)}")
    if part.about:
        say(f"    {part.about}")
    for name, (count, nbytes) in part.formats.items():
        say(f"    {name:<12} {count:>5} tensors {format_gb(nbytes):>12}")
    if len(part.formats) > 1 and part.groups:
        for group, (formats, nbytes) in part.groups.items():
            say(f"    {group:<19} {format_gb(nbytes):>11}  {' '.join(formats)}")
    if part.unused:
        say(f"    carries what the model has no use for: {said_of_unused(part.unused)}")
    if part.recipe:
        say(f"    made by the recipe {_shortened(part.recipe)}")
    if merged := [one for one in part.merged if "name" in one]:
        said = (f"{str(one['name'])[:80]} at {str(one.get('strength'))[:20]}" for one in merged)
        say(f"    merged into it: {', '.join(said)}")


def _as_json(part: Any) -> dict[str, Any]:
    formats = {name: {"tensors": count, "bytes": nbytes} for name, (count, nbytes) in part.formats.items()}
    groups = {name: {"formats": formats, "bytes": nbytes} for name, (formats, nbytes) in part.groups.items()}
    return {**asdict(part), "formats": formats, "groups": groups}


def _shortened(recipe: str) -> str:
    """Its first rules: `auto` has one for each tensor, which --json has all of."""
    name, *rules = recipe.split(" ")
    more = f" and {len(rules) - RULES} more" if len(rules) > RULES else ""
    return " ".join([name, *rules[:RULES]]) + more
