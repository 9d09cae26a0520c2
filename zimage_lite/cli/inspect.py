"""zimage-lite inspect FILE_OR_FOLDER"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..units import format_gb
from . import print_json, say


@click.command(name="inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
def command(path: Path, as_json: bool) -> None:
    """Say what a file or folder is: model, layout, formats by tensor count and bytes, what would be refused and why.

    Reads headers only.
    """
    from ..inspection import inspect

    report = inspect(path)
    for part in report:
        _describe(part)
    if as_json:
        print_json({"path": str(path), "parts": [_as_json(part) for part in report]})
    if all(part.refusal for part in report):
        raise click.exceptions.Exit(2)


def _describe(part: Any) -> None:
    if part.refusal is not None:
        say(f"{part.name}: refused: {part.refusal}")
        return
    say(f"{part.name}: {part.model}, {part.layout}, {part.tensors} tensors, {format_gb(part.bytes)}")
    for name, (count, nbytes) in part.formats.items():
        say(f"    {name:<8} {count:>5} tensors {format_gb(nbytes):>12}")


def _as_json(part: Any) -> dict[str, Any]:
    formats = {name: {"tensors": count, "bytes": nbytes} for name, (count, nbytes) in part.formats.items()}
    return {**asdict(part), "formats": formats}
