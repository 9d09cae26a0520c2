"""zimage-lite formats [FORMAT]"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from ..units import format_gb
from . import print_json, table_printer


@click.command(name="formats")
@click.argument("name", metavar="[FORMAT]", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
def command(name: str | None, as_json: bool) -> None:
    """List what quantize can write: size, bits per weight, who else reads it, how it computes. With FORMAT: its recipe.

    Sizes are those of the true transformer, 6.15 billion weights.
    """
    from ..convert.catalog import all_targets, computed
    from ..convert.recipe import target
    from ..quant.formats import FORMATS

    if name is not None:
        _recipe(target(name, "FORMAT"), as_json)
        return
    found, say = all_targets(), table_printer(as_json)
    say(f"{'format':<9} {'bits':>5} {'transformer':>11}  {'container':<12} also read by")
    for row, cost in found:
        container = "GGUF" if row.container == "gguf" else "safetensors"
        readers = ", ".join(row.read_by)
        say(f"{row.name:<9} {cost.bits_per_weight:>5.2f} {format_gb(cost.bytes):>11}  {container:<12} {readers}")
        say(f"{'':<9} {row.summary}; {computed(row)}")
    others = sorted(row.name for row in FORMATS.values() if not row.writable)
    say(f"read as well: {', '.join(others)}")
    if as_json:
        rows = [{**_facts(row), "bits_per_weight": cost.bits_per_weight, "bytes": cost.bytes} for row, cost in found]
        print_json({"formats": rows, "read_only": others})


def _recipe(chosen: Any, as_json: bool) -> None:
    from ..convert.catalog import computed, costs, kept

    say = table_printer(as_json)
    say(f"{chosen.name}: {chosen.summary}")
    say(f"{computed(chosen)}; also read by {', '.join(chosen.read_by)}")
    parts = {component: costs(chosen, component) for component in ("transformer", "text_encoder")}
    for component, found in parts.items():
        say(f"{component:<20} {'weights':>9} {'size':>10} {'bits':>6}  format")
        for cost in found:
            weights = f"{cost.weights / 1e6:,.1f} M"
            size = format_gb(cost.bytes)
            say(f"  {cost.name:<18} {weights:>9} {size:>10} {cost.bits_per_weight:>6.2f}  {' '.join(cost.formats)}")
    now, packed = kept(chosen)
    if now:
        main = chosen.recipes["transformer"].format
        say(f"kept in 16 bits: {format_gb(now)} of the transformer, which {main} would store in {format_gb(packed)}")
    say(f"text encoder beside such a transformer: {chosen.text_encoder_to}, unless --text-encoder-to says otherwise")
    if as_json:
        groups = {component: [asdict(cost) for cost in found] for component, found in parts.items()}
        print_json({**_facts(chosen), "groups": groups})


def _facts(row: Any) -> dict[str, Any]:
    from ..convert.catalog import computed

    facts = {name: getattr(row, name) for name in ("name", "summary", "container", "read_by", "text_encoder_to")}
    return {**facts, "hardware": computed(row)}
