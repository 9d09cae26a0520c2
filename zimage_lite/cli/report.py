"""zimage-lite report RESULT.json..."""

from __future__ import annotations

from pathlib import Path

import click

from . import files_meant, leaving_at_once, say

_PATH = click.Path(path_type=Path)


@click.command(name="report")
@click.argument("names", metavar="RESULT.json...", nargs=-1, required=True)
@click.option("-o", "out", default=Path("report.html"), type=_PATH, show_default=True, help="One self-contained page.")
@click.option("--markdown", type=_PATH, metavar="FILE.md", help="The same in Markdown, without the pictures.")
def command(names: tuple[str, ...], out: Path, markdown: Path | None) -> None:
    """Turn results of bench, of compare and of the scripts in benchmarks/ into a page that needs no network.

    Tables of what was measured and what was predicted, plots, and how far predictions were off where both are known.
    """
    with leaving_at_once():
        from ..checkpoint.output import replacing, require_absent
        from ..page.html import as_html, as_markdown
        from ..report.sections import TITLE, load, sections
    wanted = {out: as_html, **({markdown: as_markdown} if markdown else {})}
    for path in wanted:
        require_absent(path, overwrite=True)
    found = sections(load([Path(name) for name in files_meant(names)]))
    for path, render in wanted.items():
        with replacing(path) as partial:
            partial.write_text(render(TITLE, found), encoding="utf-8")
        say(f"{path}")
