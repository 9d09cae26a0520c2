"""What a report shows of a result of `zimage-lite compare`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..page.html import GIB, NOTHING, Section, Table, gb
from ..units import format_gb
from .likeness import NAMES, said

COMPARE = "zimage-lite compare"


def compare_section(name: str, result: Mapping[str, Any]) -> Section:
    models, images = result["models"], result["images"]
    sizes = ", ".join(dict.fromkeys("{}x{}".format(*one["size"]) for one in images))
    there = [figure for figure in NAMES if any(figure in model.get("alike", {}) for model in models)]
    text = (
        f"Pictures: {len(images)}, of {sizes} in {result['steps']} steps, the same prompts and seeds for every model, "
        f"against those of {models[0]['label']}: the mean and, in brackets, the worst picture."
    )
    if "lpips" not in there:
        text += f" LPIPS is left out: {result['lpips']}."
    if any(model["synthetic"] for model in models):
        text += " Random weights draw noise: how alike these pictures are says nothing."
    rows = []
    for model in models:
        vram = f"{model['peak_vram_bytes'] / GIB:.2f} GiB" if model["peak_vram_bytes"] else NOTHING
        alike = [_pair(figure, model.get("alike", {}).get(figure)) for figure in there]
        size, seconds = format_gb(model["bytes"]), f"{model['seconds_per_image']:.2f}"
        bits = model["dtype"] if model["compute"] == "16bit" else model["compute"]  # as --compute names it
        how = f"{bits}, {model['backend']}, {model['device']}"
        rows.append(
            [str(model["label"]), str(model["format"]), how, size, seconds, gb(model["peak_rss_bytes"]), vram, *alike]
        )
    header = ["model", "format", "computed in", "files", "s per image", "RAM", "GPU memory"]
    header += [NAMES[figure] for figure in there]
    return Section(f"Reference against quantized ({name})", [text, Table(header, rows, texts=3)])


def _pair(figure: str, one: Mapping[str, Any] | None) -> str:
    """Mean and worst."""
    return f"{said(figure, one['mean'])} ({said(figure, one['worst'])})" if one else "reference"
