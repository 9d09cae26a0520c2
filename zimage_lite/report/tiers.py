"""What a report shows of a result of `zimage-lite bench`: the tier's table, its phases, its plots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..bench.tiers import DONE, TIERS
from ..page.html import GIB, NOTHING, Figure, Section, Table, gb
from ..page.plots import Plot, Point

_PLOTTED = 1024  # pixels each way


def tier_section(name: str, result: Mapping[str, Any]) -> Section:
    tier, cells = result["tier"], result["cells"]
    what = f"Tier {tier['name']}" if tier else "This machine as it is"
    section = Section(f"{what} ({name})")
    if tier:
        section.parts.append(
            f"{tier['vram_bytes'] / GIB:.2f} GiB free on a card such as {tier['gpu_name']}, {gb(tier['ram_bytes'])} of "
            f"RAM for the process, copies at {tier['link_gbps']:g} GB/s; {result['steps']} steps."
        )
    measured = [cell for cell in cells if not cell["prediction"]]
    if not measured:
        section.parts.append("A prediction: nothing in this table was run.")
    elif tier:
        section.parts.append(
            "Measured rows ran on the card named there, held to the tier's memory: its compute and its link are its "
            "own, so only memory and shares of the limit carry over to a smaller card."
        )
    rows, bad = list[list[str]](), set[tuple[int, int]]()
    order = sorted(cells, key=lambda cell: (cell["size"][0] or 0, str(cell["format"]), cell["prediction"]))
    for cell in order:
        if cell["outcome"] != DONE:
            bad.add((len(rows), 7))
        rows.append(_cell(cell, result["machine"]))
    header = ("card", "format", "size", "seconds", "GPU memory", "RAM", "of the limit", "how it went")
    section.parts.append(Table(header, rows, texts=2, bad=frozenset(bad)))
    for cell in measured:
        if "seconds" in cell:
            section.parts += _phases(cell)
    section.parts += _sweeps(result)
    section.parts += _timeline(tier)
    if "assumptions" in result:
        section.parts.append("Predictions assume: " + "; ".join(map(str, result["assumptions"])) + ".")
    return section


def overview(results: Sequence[Mapping[str, Any]]) -> Iterator[Section]:
    """Of several tiers: what is predicted for the card that stands for each, one row per tier. results: of tiers."""
    if len(results) < 2:
        return
    columns: dict[str, None] = {}
    cards = list[tuple[str, dict[str, str]]]()
    for result in sorted(results, key=lambda result: result["tier"]["vram_bytes"]):
        tier = result["tier"]
        cells = {
            str(cell["format"]): _predicted(cell)
            for cell in result["cells"]
            if cell["prediction"] and cell["gpu"] == tier["gpu_name"] and cell["size"] == [_PLOTTED, _PLOTTED]
        }
        columns |= dict.fromkeys(cells)
        cards.append((f"{tier['name']}: {tier['gpu_name']}", cells))
    rows = [[card, *(cells.get(name, NOTHING) for name in columns)] for card, cells in cards]
    text = (
        f"Seconds for one image of {pixels([_PLOTTED, _PLOTTED])} in {results[0]['steps']} steps with loading, from "
        "the highest to the lowest power limit, and the process's peak GPU memory: predicted, not measured on these "
        "cards."
    )
    yield Section("All tiers", [text, Table(("tier and card", *columns), rows)])


def _predicted(cell: Mapping[str, Any]) -> str:
    if cell["outcome"] != DONE:
        return str(cell["outcome"])
    return f"{seconds_range(cell['seconds']['range'])} s, {cell['peak_vram_bytes'] / GIB:.2f} GiB"


def _cell(cell: Mapping[str, Any], machine: Mapping[str, Any]) -> list[str]:
    card = f"{cell['gpu']}, predicted" if cell["prediction"] else f"{machine.get('gpu', 'CPU')}, measured"
    start = [card, str(cell["format"]), pixels(cell["size"])]
    if cell["outcome"] != DONE:
        return [*start, NOTHING, NOTHING, NOTHING, NOTHING, f"{cell['outcome']}: {cell.get('reason', '')}"]
    if cell["prediction"]:
        bound = f"bound by {cell['phases']['denoise']['planned']['bound_by']}"
        memory = [f"{cell['peak_vram_bytes'] / GIB:.2f} GiB", gb(cell["peak_ram_bytes"])]
        return [*start, seconds_range(cell["seconds"]["range"]), *memory, NOTHING, bound]
    warm = cell["seconds"]["warm"]
    vram, part = cell.get("process_peak_bytes"), cell.get("step_share_of_limit")
    return [
        *start,
        f"{warm['median']:.2f} ({warm['min']:.2f} to {warm['max']:.2f}), cold {cell['seconds']['cold']:.2f}",
        f"{vram / GIB:.2f} GiB" if vram else NOTHING,
        gb(cell["peak_rss_bytes"]),
        f"{part:.0%} of a step" if part else NOTHING,
        "; ".join(map(str, cell["told"])) or "as planned",
    ]


def _phases(cell: Mapping[str, Any]) -> Iterator[str | Table]:
    ceilings = cell.get("ceilings")
    reached = ""
    if ceilings:
        eight = f", {ceilings['int8_tops']:.1f} in int8" if ceilings["int8_tops"] else ""
        reached = f"; ceilings in the same run: {ceilings['tflops']:.2f} TFLOP/s in {ceilings['dtype']}{eight}"
    yield f"{cell['format']} at {pixels(cell['size'])}, phase by phase{reached}."
    rows = []
    for name, phase in cell["phases"].items():
        warm, vram, part = phase["seconds"]["warm"], phase.get("peak_vram_bytes"), phase.get("share_of_limit")
        rows.append([
            name, f"{warm['median']:.3f}", f"{phase['seconds']['cold']:.3f}",
            f"{vram / GIB:.2f} GiB" if vram else NOTHING, gb(phase["peak_rss_bytes"]),
            gb(phase.get("copied_bytes", 0)), gb(phase.get("read_bytes", 0)), f"{phase.get('wait_seconds', 0):.3f}",
            f"{phase['tflops']:.3f}" if phase.get("tflops") else NOTHING, f"{part:.0%}" if part else NOTHING,
        ])  # fmt: skip
    header = ("phase", "warm s", "cold s", "allocated", "peak RAM", "copied", "read", "waited s", "TFLOP/s", "of limit")
    yield Table(header, rows)


def _sweeps(result: Mapping[str, Any]) -> Iterator[Figure]:
    series: dict[str, list[Point]] = {}
    for one in result.get("sweeps", []):
        points = [Point(p["vram_bytes"] / 1e9, float(p["range"][0])) for p in one["points"]]
        if points:
            series[f"{one['format']}, predicted"] = points
    cap = result["tier"]["vram_bytes"] / 1e9 if result["tier"] else 0.0
    for cell in result["cells"]:
        if not cell["prediction"] and cell["outcome"] == DONE and cell["size"] == [_PLOTTED, _PLOTTED] and cap:
            warm = cell["seconds"]["warm"]
            series[f"{cell['format']}, measured"] = [Point(cap, warm["min"], warm["max"])]
    if series:
        title = f"Seconds per image at {pixels([_PLOTTED, _PLOTTED])} against the budget of GPU memory"
        plot = Plot(title, "GB of GPU memory", "seconds", series)
        caption = f"{title}. Predictions are for {result['tier']['gpu_name']} at its highest power limit."
        if any(point.high is not None for points in series.values() for point in points):
            caption += " Bars: from the fastest to the slowest measured run."
        yield Figure(plot.svg(), caption)


def _timeline(tier: Mapping[str, Any] | None) -> Iterator[Figure]:
    """Of the tier's own card and the first of its formats that streams. Planned anew: pictures from files are not
    trusted."""
    if not tier or tier["name"] not in TIERS:
        return
    from ..bench.predict import plans
    from ..plan.model_sizes import true_model
    from ..plan.timeline import as_svg

    ours = TIERS[tier["name"]]
    for name in ours.formats:
        denoise = plans(true_model(name), ours.gpu, _PLOTTED, ours.ram_bytes)[0][1]
        if denoise.streamed or name == ours.formats[-1]:
            title = f"Prediction: one step of {name} at {_PLOTTED}x{_PLOTTED} on {ours.gpu.name}"
            caption = f"{title}: who copies and computes when. Grey blocks stay on the device."
            yield Figure(as_svg(denoise, title), caption, wide=True)
            return


def pixels(size: Sequence[Any]) -> str:
    return f"{size[0]}x{size[1]}" if size[0] else "the model's"


def seconds_range(seconds: Sequence[float]) -> str:
    fast, slow = seconds
    return f"{fast:.1f}" if fast == slow else f"{fast:.1f} to {slow:.1f}"
