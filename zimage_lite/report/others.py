"""What a report shows of the results of the scripts in benchmarks/."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..bench.tiers import DONE
from ..compare.likeness import said
from ..page.html import GIB, NOTHING, Figure, Section, Table, gb
from ..page.plots import Plot, Point

Result = Mapping[str, Any]

PEERS = "zimage-lite peers"  # the kind of what benchmarks/peers writes


def sections_of(name: str, result: Result) -> Iterator[Section]:
    """What a file has to show; nothing, if it is of none of our benchmarks."""
    runs, rows = result.get("runs", []), result.get("rows", [])
    if result.get("kind") == PEERS:
        yield _peers(name, result)
    elif "captions" in result:
        yield _formats(result)
    elif "ggml" in result:
        yield _conversion(result)
    elif "counted" in result:
        yield _vae(result)
    elif "missed" in result:
        text = f"{len(rows)} ways of moving blocks, {result['missed']} slower than their bar; times below."
        yield Section(f"Streaming workers on a virtual GPU ({name})", [text])
    elif "card" in result:
        yield _ops(name, result)
    elif "cases" in result:
        yield _streaming(name, result)
    elif any("faster_than_diffusers" in row for row in rows):
        yield _cpu_step(result)
    elif any("kept" in run for run in runs):
        yield _budgets(name, result)
    elif (runs and "ram" in result) or ("images" in result and "phases" in result):
        yield Section(f"One model at full size ({name})", ["Its predictions and measurements stand below."])


def _cpu_step(result: Result) -> Section:
    header = ("", "way", "seconds", "times as fast as diffusers", "relative error")
    rows = [
        [
            row["what"],
            way,
            f"{seconds:.3f}",
            f"{row['faster_than_diffusers'][way]:.2f}",
            f"{row['relative_error'][way]:.1e}",
        ]
        for row in result["rows"]
        for way, seconds in row["median"].items()
    ]
    return Section(f"A step on the CPU, {result['tokens']} tokens", [Table(header, rows)])


def _ops(name: str, result: Result) -> Section:
    """Of benchmarks/ops: whatever a script measures has a name and a number. Bars that were missed are pointed out, and
    results that were wrong."""
    header = list(dict.fromkeys(key for row in result["rows"] for key in row))
    rows, bad = list[list[str]](), set[tuple[int, int]]()
    for row in result["rows"]:
        bad |= {(len(rows), header.index(key)) for key in ("kept", "check", "error") if row.get(key, True) not in _GOOD}
        rows.append([_figure(row.get(key, NOTHING)) for key in header])
    return Section(f"Single ops ({name})", [Table(header, rows, bad=frozenset(bad))])


_GOOD = (True, "ok")


def _figure(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _formats(result: Result) -> Section:
    rows, series = [], dict[str, list[Point]]()
    for row in sorted(result["rows"], key=lambda row: -row["transformer_bytes"]):
        error, pictures = row["full_size"]["all"]["relative_rmse"], row["pictures"]
        size = row["transformer_bytes"] / 1e9
        bits = f"{row['bits_per_weight']:.2f}"
        alike = [said(figure, pictures[figure]) for figure in ("psnr_db", "ssim")]
        right = f"{pictures['right_all']:.1f}"
        rows.append([row["format"], bits, f"{size:.2f} GB", f"{error:.4f}", *alike, right])
        if error > 1e-4:
            series.setdefault(row["container"], []).append(Point(round(size, 3), error, label=row["format"]))
    title = "Error of the weights against the size of the transformer"
    plot = Plot(title, "GB", "relative RMSE", series, logarithmic=True, joined=False)
    text = (
        "Bits and size: the true transformer. Relative RMSE: of all its weights, on a full-size checkpoint of random "
        f"weights. Pictures: {result['captions']} captions drawn by the demo with weights of that format, against "
        "those of the unquantized demo; right: background, colour and shape are what the caption says, in per cent."
    )
    header = ("format", "bits per weight", "transformer", "relative RMSE", "PSNR", "SSIM", "right")
    section = Section("What each format costs", [text, Table(header, rows)])
    if series:
        section.parts.append(Figure(plot.svg(), f"{title}. Less is better on both. Colours: the kind of file."))
    return section


def _conversion(result: Result) -> Section:
    header = ("format", "seconds", "a plain copy", "ratio", "peak RAM")
    rows = [
        [row["format"], *(f"{row[key]:.2f}" for key in ("seconds", "copy_seconds", "ratio")), gb(row["max_rss_bytes"])]
        for row in result["rows"]
    ]
    return Section("Converting the full-size transformer", [Table(header, rows)])


def _vae(result: Result) -> Section:
    header = ("way", "size", "seconds", "peak", "largest difference")
    rows = [
        [
            one["way"],
            one["size"],
            f"{one['seconds']:.1f}",
            gb(one["peak_bytes"]),
            f"{one['max_difference_of_range']:.0e}",
        ]
        for one in result["runs"]
    ]
    return Section("Decoding: whole, in bands, and diffusers", [Table(header, rows)])


def _streaming(name: str, result: Result) -> Section:
    header = ("format", "size", "cap", "ms per step", "peak GPU memory", "waited s", "how it went")
    rows, bad = list[list[str]](), set[tuple[int, int]]()
    for case in result["cases"]:
        cap = f"{case['cap_bytes'] / GIB:.2f} GiB" if case["cap_bytes"] else "none"
        start = [case["name"], str(case["size"]), cap]
        if case.get("failed"):
            bad.add((len(rows), 6))
            rows.append([*start, NOTHING, NOTHING, NOTHING, str(case["failed"])])
            continue
        peak, waited = case["process_peak_bytes"], case["phases"]["denoise"]["wait_seconds"]
        vram = f"{peak / GIB:.2f} GiB" if peak else NOTHING
        rows.append([*start, f"{case['steady_ms']:.1f}", vram, f"{waited:.2f}", "; ".join(map(str, case["told"]))])
    return Section(f"Streaming on a GPU ({name})", [Table(header, rows, bad=frozenset(bad))])


def _budgets(name: str, result: Result) -> Section:
    header = ("format", "size", "--ram", "seconds", "s per step", "peak RAM", "planned", "how it went")
    rows, bad, series = list[list[str]](), set[tuple[int, int]](), dict[str, list[Point]]()
    for run in result["runs"]:
        start = [run["format"], str(run["size"]), f"{run['ram_bytes'] / 1e9:g} GB"]
        if "refused" in run:
            bad.add((len(rows), 7))
            rows.append([*start, *[NOTHING] * 4, run["refused"]])
            continue
        step = run["step_seconds"][-1]  # the first one loads
        if not run["kept"]:
            bad.add((len(rows), 7))
        memory = [gb(run["peak_rss_bytes"]), gb(run["planned_rss_bytes"])]
        how = "kept" if run["kept"] else "not kept"
        rows.append([*start, f"{run['wall_seconds']:.1f}", f"{step:.1f}", *memory, how])
        series.setdefault(f"{run['format']}, {run['size']} px", []).append(Point(run["ram_bytes"] / 1e9, step))
    section = Section(f"Time against the budget of RAM, on a CPU ({name})", [Table(header, rows, bad=frozenset(bad))])
    if series:
        plot = Plot("Seconds per step against --ram", "GB of RAM", "seconds per step", series)
        section.parts.append(Figure(plot.svg(), "Seconds of a step that has nothing to load, against --ram."))
    return section


def _peers(name: str, result: Result) -> Section:
    section = Section(f"Beside others ({name})")
    tier, rows = result["tier"], result["rows"]
    section.parts.append(
        f"{result['size']}x{result['size']} in {result['steps']} steps, the median of {result['repeats']} warm images, "
        f"or the cold one where there is no other. On a GPU within {tier['vram_bytes'] / GIB:.2f} GiB. Beside a time: "
        "how many times as long as zimage-lite took with weights of as many bits on the same device. GPU memory is "
        "that of the whole process, as the driver counts; RAM is the operating system's peak."
    )
    ours = _fastest_of_ours(rows)
    cells, bad = list[list[str]](), set[tuple[int, int]]()
    for row in rows:
        vram = row.get("process_peak_bytes")
        if row["outcome"] != DONE or (vram and row["device"] == "cuda" and vram > tier["vram_bytes"]):
            bad.add((len(cells), 6))
        cells.append(_peer(row, ours.get((row["bits"], row["device"])), tier["vram_bytes"]))
    header = ("program", "setting", "s per image", "s per step", "GPU memory", "RAM", "how it went")
    section.parts.append(Table(header, cells, texts=2, bad=frozenset(bad)))
    versions = {f"{what} {version}" for row in rows for what, version in row["versions"].items()}
    section.parts.append(f"Versions: {', '.join(sorted(versions)) or NOTHING}. Exact settings are in the file.")
    return section


def _fastest_of_ours(rows: Sequence[Result]) -> dict[tuple[int, str], dict[str, float]]:
    """Bits and device -> the least seconds of zimage-lite's measured rows."""
    found: dict[tuple[int, str], dict[str, float]] = {}
    for row in rows:
        if row["peer"] == "zimage-lite" and row["outcome"] == DONE and not row["prediction"]:
            best = found.setdefault((row["bits"], row["device"]), {})
            for what, seconds in _seconds(row).items():
                best[what] = min(seconds, best.get(what, seconds))
    return found


def _seconds(row: Result) -> dict[str, float]:
    """Of an image, and of a step where there is more than one."""
    found = {"image": float(row["seconds"].get("warm", {}).get("median", row["seconds"]["cold"]))}
    return {**found, "step": float(row["step_seconds"]["median"])} if "step_seconds" in row else found


def _peer(row: Result, ours: Mapping[str, float] | None, cap_bytes: float) -> list[str]:
    start = [str(row["peer"]), f"{row['setting']} ({row['device']})"]
    ram, vram = row.get("peak_rss_bytes"), row.get("process_peak_bytes")
    if row["outcome"] != DONE:
        how = f"{row['outcome']}: {row['reason']}" if row.get("reason") else str(row["outcome"])
        return [*start, NOTHING, NOTHING, NOTHING, NOTHING, how]
    memory = f"{vram / GIB:.2f} GiB" if vram else NOTHING
    if row["prediction"]:
        times = [f"{low:.2f} to {high:.2f}" for low, high in (row["planned_seconds"], row["planned_step_seconds"])]
        return [*start, *times, memory, gb(row["planned_ram_bytes"]), f"prediction for {row['gpu']}"]
    over = row["device"] == "cuda" and vram and vram > cap_bytes
    found = _seconds(row)
    times = [_beside(found.get(what), (ours or {}).get(what)) for what in ("image", "step")]
    how = "more memory than the tier has" if over else "; ".join(map(str, row.get("told", []))) or "done"
    return [*start, *times, memory, gb(ram) if ram else NOTHING, how]


def _beside(seconds: float | None, ours: float | None) -> str:
    if seconds is None:
        return NOTHING
    return f"{seconds:.2f} ({seconds / ours:.2f} x)" if ours else f"{seconds:.2f}"
