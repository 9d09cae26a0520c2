"""The harness of `zimage-lite bench` and of benchmarks/tiers: which cases there are, each measured in a process of its
own or planned, and what is made of the measurements.

A result is plain data: "prediction", "machine", "tier", and "cells", one per format and size. Cells that were run hold
every run, so that whoever doubts the figures can make them again; cells that were planned say so ("prediction": true).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from statistics import median
from subprocess import PIPE
from tempfile import TemporaryFile
from threading import Timer
from time import monotonic
from typing import Any

from .tiers import DONE, FAILED, NOT_RUN, SIZES, STEPS, Tier

KIND = "zimage-lite bench"
REPEATS, MIN_REPEATS = 5, 2  # warm ones; fewer show no spread
CASE_LIMIT_SECONDS = 1800

_SUMS = ("copied_bytes", "read_bytes", "wait_seconds")
_PEAKS = ("peak_vram_bytes", "peak_reserved_bytes", "pinned_bytes", "peak_rss_bytes")

Save = Callable[[dict[str, Any]], None]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What to measure. tier: None for this machine as it is. models: label -> MODEL; sizes: pixels each way, None for
    the model's own."""

    tier: Tier | None
    models: dict[str, str]
    sizes: tuple[int | None, ...]
    repeats: int = REPEATS
    steps: int = STEPS

    @classmethod
    def of(
        cls, tier: Tier | None, model: str | None, formats: Sequence[str], sizes: Sequence[int], repeats: int
    ) -> Request:
        """With what a tier would try where nothing else is named; the demo where there is no tier, either."""
        if model or not (tier or formats):
            models = {model or "demo": model or "demo"}
        else:
            models = {name: f"synthetic:{name}" for name in formats or (tier.formats if tier else ())}
        return cls(tier, models, tuple(sizes) or (SIZES if tier else (None,)), repeats)


def bench(request: Request, tell: Tell, save: Save) -> dict[str, Any]:
    """Measure where the tier can be enforced or none is named, else predict. save: takes the result after each case, so
    that nothing is lost."""
    tier = request.tier
    why_not = missing(tier.vram_bytes) if tier else None
    from .machine import asked, commit

    if why_not:
        tell(f"A prediction, nothing was run: {why_not}")
    result: dict[str, Any] = {
        "kind": KIND,
        "prediction": why_not is not None,
        "tier": told_tier(tier) if tier else None,
        "machine": asked(),
        "commit": commit(),
        "steps": request.steps,
        "cells": [],
    }
    if tier is None:
        require_there(request.models)
    else:
        predict(result, request, tier, tell if why_not else lambda line: None)
        save(result)
    if not why_not:
        run(result, request, tell, save)
    return result


def missing(vram_bytes: int) -> str | None:
    """Why a tier cannot be enforced here; None if it can."""
    import torch

    if not torch.cuda.is_available():
        return "there is no CUDA GPU here"
    there = torch.cuda.get_device_properties(0).total_memory
    if there < vram_bytes:
        return f"this GPU has {there / 2**30:.1f} GiB, and the tier is {vram_bytes / 2**30:.1f} GiB"
    return None


def require_there(models: dict[str, str]) -> None:
    """Raises UserError for a MODEL that cannot be opened."""
    from ..api import open_named

    for name in models.values():
        open_named(name, {})


def told_tier(tier: Tier) -> dict[str, Any]:
    """As plain data."""
    facts = {key: value for key, value in asdict(tier).items() if key != "formats"}
    return {**facts, "vram_bytes": tier.vram_bytes, "link_gbps": tier.gpu.link_gbps}


def predict(result: dict[str, Any], request: Request, tier: Tier, tell: Tell) -> None:
    """Every case on the tier's card, one size on the others of that memory, and budgets below it."""
    from ..api import open_named
    from ..plan.model_sizes import model_of, true_model
    from .predict import assumptions, cell, sweep, told

    result |= {"assumptions": assumptions(), "sweeps": []}
    gpus = tier.gpus
    only = 1024 if 1024 in request.sizes else request.sizes[0]
    for label, name in request.models.items():
        synthetic = name.removeprefix("synthetic:")
        model = true_model(synthetic) if synthetic != name else model_of(open_named(name, {}))
        for size in request.sizes:
            assert size is not None, "a tier names its sizes"
            for gpu in gpus if size == only else gpus[:1]:
                row = cell(model, label, gpu, size, tier)
                result["cells"].append(row)
                tell(told(row))
        result["sweeps"].append(sweep(model, label, tier))


def run(result: dict[str, Any], request: Request, tell: Tell, save: Save) -> None:
    """Measure all cases. Those that are still to come are in the result already, and the images of one so far, so that
    nothing is lost."""
    tier = request.tier
    rows = [
        {"prediction": False, "model": name, "format": label, "size": [size, size], "outcome": NOT_RUN}
        for size in request.sizes
        for label, name in request.models.items()
    ]
    result["cells"] += rows
    for row in rows:
        case = {
            "model": row["model"],
            "size": row["size"][0],  # type: ignore[index]
            "repeats": request.repeats,
            "steps": request.steps,
            "vram_bytes": tier.vram_bytes if tier else None,
            "ram_bytes": tier.ram_bytes if tier else None,
        }

        def so_far(runs: list[dict[str, Any]], row: dict[str, Any] = row) -> None:
            row |= {"outcome": FAILED, "reason": f"interrupted after {len(runs)} images", "runs": runs}
            save(result)

        found = summary(in_process(case, so_far=so_far))
        row.pop("reason", None)
        row |= found
        tell(told_cell(row))
        save(result)


def in_process(
    case: dict[str, Any],
    limit: float = CASE_LIMIT_SECONDS,
    so_far: Callable[[list[dict[str, Any]]], None] = lambda runs: None,
) -> dict[str, Any]:
    """What `case` made of it, or that it failed and how, with the runs until then. so_far: given these after each."""
    command = [sys.executable, "-m", "zimage_lite.bench.case", json.dumps(case)]
    runs: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}  # else Windows has its own; libraries may write anything
    with (
        TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(
            command, stdout=PIPE, stderr=errors, env=environment, encoding="utf-8", errors="replace"
        ) as process,
    ):
        timer, end = Timer(limit, process.kill), monotonic() + limit
        timer.start()
        try:
            for result in _facts(process):
                if "run" in result:
                    runs.append(result["run"])
                    so_far(runs)
            code, in_time = process.wait(), monotonic() < end
        finally:
            timer.cancel()
            process.kill()
        errors.seek(0)
        lines = errors.read().strip().splitlines() or [f"ended with {code}"]  # -9: the system's OOM killer
    if code == 0 and "outcome" in result:
        return result
    reason = lines[-1][-500:] if in_time else f"took longer than {limit:g} s"
    return {"outcome": FAILED, "reason": reason} | ({"runs": runs} if runs else {})


def _facts(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """The lines of its output that are JSON; libraries may print others."""
    for line in process.stdout or ():
        with suppress(ValueError):
            yield dict(json.loads(line))


def summary(raw: dict[str, Any]) -> dict[str, Any]:
    """What is made of a case's runs: medians and spreads of the warm ones, rates, and shares of the limit."""
    runs = raw.get("runs", [])
    if raw["outcome"] != DONE or len(runs) < 2:
        return raw
    cold, warm, work = runs[0], runs[1:], raw.get("work", {})
    steps = [seconds for one in warm for seconds in one["step_seconds"][1:]]  # the first one loads
    found = {
        **raw,
        "seconds": {"cold": cold["seconds"], "warm": spread(one["seconds"] for one in warm)},
        "phases": {
            name: _phase(name, [one["phases"][name] for one in runs if name in one["phases"]], planned, work.get(name))
            for name, planned in raw["plans"].items()
        },
    }
    if steps:
        found["step_seconds"] = spread(steps)
        if "denoise" in work:
            found["step_share_of_limit"] = share(work["denoise"]["pass_limit_seconds"], median(steps))
    return found


def _phase(name: str, runs: list[dict[str, float]], planned: dict, work: dict[str, float] | None) -> dict[str, Any]:
    """runs: what the meter says of this phase, the cold one first."""
    warm = runs[1:]
    seconds = spread(one["seconds"] for one in warm)
    found: dict[str, Any] = {
        "planned": planned,
        "seconds": {"cold": runs[0]["seconds"], "warm": seconds},
        **{key: median(one[key] for one in warm) for key in _SUMS if all(key in one for one in warm)},
        **{key: max(one[key] for one in runs) for key in _PEAKS if all(key in one for one in runs)},
    }
    if work:
        found["tflops"] = rate(work["flops"], seconds["median"])
        found["share_of_limit"] = share(work["limit_seconds"], seconds["median"])
    return found


def spread(values: Any) -> dict[str, float]:
    """Median, least, most, and how far these are apart as a part of the median."""
    found = sorted(values)
    middle = median(found)
    apart = (found[-1] - found[0]) / middle if middle else 0.0
    return {"median": round(middle, 4), "min": found[0], "max": found[-1], "spread": round(apart, 4)}


def rate(flops: float, seconds: float) -> float | None:
    """In TFLOP/s; None for what took no time that was measured."""
    return round(flops / seconds / 1e12, 4) if seconds else None


def share(limit_seconds: float, seconds: float) -> float | None:
    """1: as fast as the measured ceilings allow."""
    return round(limit_seconds / seconds, 4) if seconds else None


def told_cell(row: dict[str, Any]) -> str:
    """A line for people."""
    start = f"{row['format']:<8}{row['size'][0] or '':>5}  "
    if row["outcome"] != DONE:
        return f"{start}{row['outcome']}: {row.get('reason', '')}"
    warm = row["seconds"]["warm"]
    vram = row.get("process_peak_bytes")
    part = row.get("step_share_of_limit")
    return (
        f"{start}cold {row['seconds']['cold']:.2f} s, warm {warm['median']:.2f} s (spread {warm['spread']:.0%}), "
        + (f"{vram / 2**30:.2f} GiB of GPU memory, " if vram else "")
        + f"{row['peak_rss_bytes'] / 1e9:.2f} GB of RAM"
        + (f", steps at {part:.0%} of the limit" if part else "")
    )
