"""Predicted against measured, for every result that holds both.

A ratio is predicted / measured: below 1 the plan was too good, above 1 too careful. Times are predicted for the machine
as the planner knew it, whose rates may be assumed; peaks are promises, and hold anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from statistics import median
from typing import Any

MOST_OFF = 0.15

TIME, MEMORY = "time", "peak memory"
_OLD_NAMES = {"text_encoder": "encode", "transformer": "denoise", "vae": "decode"}


@dataclass(frozen=True)
class Ratio:
    """predicted and measured: both in seconds, or both in bytes."""

    source: str
    what: str
    quantity: str
    predicted: float
    measured: float

    @property
    def value(self) -> float:
        return self.predicted / self.measured


@dataclass(frozen=True)
class Compared:
    """All ratios of one kind of run."""

    source: str
    what: str
    quantity: str
    values: tuple[float, ...]

    @property
    def middle(self) -> float:
        return median(self.values)

    @property
    def worst(self) -> float:
        """The one that is furthest from 1, as a part: -0.2 is 20 % less than measured."""
        return max((value - 1 for value in self.values), key=abs)

    @property
    def off(self) -> bool:
        return abs(self.worst) > MOST_OFF


def compared(results: Mapping[str, Mapping[str, Any]]) -> list[Compared]:
    """results: name of a file -> what it holds."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for source, result in results.items():
        for one in ratios(source, result):
            if one.measured > 0 and isfinite(one.value):
                found.setdefault((one.source, one.what, one.quantity), []).append(one.value)
    return [Compared(*key, tuple(values)) for key, values in found.items()]


def ratios(source: str, result: Mapping[str, Any]) -> Iterator[Ratio]:
    """Of one file, whichever benchmark wrote it."""
    for run in result.get("runs", []):
        if "planned_rss_bytes" in run:  # benchmarks/budgets.py
            what = f"{run['format']} {run['size']} px in {run['ram_bytes'] / 1e9:g} GB"
            yield from _generated(source, what, run)
        elif "plans" in run:  # benchmarks/full_size.py, of the plans as they were then
            yield from _of_full_size(source, run)
    if "images" in result and "phases" in result:  # zimage-lite generate --json
        yield from _generated(source, str(result["format"]), result)
    for cell in result.get("cells", []):
        if not cell["prediction"] and "phases" in cell:
            yield from _of_cell(source, cell)
    for case in result.get("cases", []):  # benchmarks/streaming_gpu.py
        if "plans" in case:
            yield from _of_streaming_case(source, case)
    for row in result.get("rows", []):
        if "simulated_ms" in row:  # benchmarks/streaming.py
            what = f"workers, {row['device']} {row['home']}"
            yield Ratio(source, what, f"{TIME} of a step", row["simulated_ms"], row["step_ms"])
    for model in result.get("models", []):  # zimage-lite compare
        yield Ratio(source, str(model["label"]), MEMORY, model["planned_rss_bytes"], model["peak_rss_bytes"])
    for row in result.get("counted", []):  # benchmarks/vae.py
        what = f"VAE {row['size']}, {row['way']}"
        yield Ratio(source, what, MEMORY, row["predicted_bytes"], row["peak_bytes"])


def _generated(source: str, what: str, run: Mapping[str, Any]) -> Iterator[Ratio]:
    for name, phase in run["phases"].items():
        planned = phase["planned"]
        yield Ratio(source, f"{what}, {name}", TIME, planned["total_ms"] / 1000, phase["measured"]["seconds"])
        if name == "denoise" and len(run["step_seconds"]) > 1:
            steady = median(run["step_seconds"][1:])
            yield Ratio(source, what, f"{TIME} of a step", planned["pass_ms"] / 1000, steady)
    yield Ratio(source, what, MEMORY, run["planned_rss_bytes"], run["peak_rss_bytes"])


def _of_cell(source: str, cell: Mapping[str, Any]) -> Iterator[Ratio]:
    what = f"{cell['format']} {cell['size'][0]} px"
    for name, phase in cell["phases"].items():
        planned = phase["planned"]["total_ms"] / 1000
        yield Ratio(source, f"{what}, {name}", TIME, planned, phase["seconds"]["warm"]["median"])
    if "step_seconds" in cell:
        planned = cell["phases"]["denoise"]["planned"]["pass_ms"] / 1000
        yield Ratio(source, what, f"{TIME} of a step", planned, cell["step_seconds"]["median"])
    plans = cell["plans"].values()
    if cell.get("process_peak_bytes"):
        planned = max(plan["peak_vram_bytes"] for plan in plans)
        yield Ratio(source, what, f"{MEMORY} of the GPU", planned, cell["process_peak_bytes"])
    yield Ratio(source, what, MEMORY, max(plan["peak_ram_bytes"] for plan in plans), cell["peak_rss_bytes"])


def _of_streaming_case(source: str, case: Mapping[str, Any]) -> Iterator[Ratio]:
    cap = f"in {case['cap_bytes'] / 2**30:g} GiB" if case["cap_bytes"] else "resident"
    what = f"{case['name']} {case['size']} px {cap}"
    for name, planned in case["plans"].items():
        yield Ratio(source, f"{what}, {name}", TIME, planned["total_ms"] / 1000, case["phases"][name]["seconds"])
    yield Ratio(source, what, f"{TIME} of a step", case["plans"]["denoise"]["pass_ms"], case["steady_ms"])
    if case["process_peak_bytes"]:
        yield Ratio(source, what, f"{MEMORY} of the GPU", case["planned_peak_bytes"], case["process_peak_bytes"])


def _of_full_size(source: str, run: Mapping[str, Any]) -> Iterator[Ratio]:
    for name, plan in run["plans"].items():
        phase = _OLD_NAMES.get(name, name)
        what = f"{run['format']}, {phase}"
        yield Ratio(source, what, MEMORY, plan["predicted_bytes"], run["phases"][phase]["peak_rss_bytes"])
