"""zimage-lite itself, through the process that `zimage-lite bench` measures with; and what is planned where there is no
GPU to measure on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

from harness import Case, Work, answer, class_of

SYNTHETIC = "synthetic:"
_ASK = "import sys; from zimage_lite.api import open_named; print(open_named(sys.argv[1], {}).transformer.main_format)"


def cases(models: Sequence[str], device: str) -> list[Case]:
    """models: as on the command line."""
    found = []
    for model in models:
        name = format_of(model)
        settings = {"model": model, "device": device}
        found.append(
            Case(
                "zimage-lite", name, class_of(name), device, "with_zimage_lite.py", settings, beside=("torch", "triton")
            )
        )
    return found


@cache
def format_of(model: str) -> str:
    """The main format of its transformer, by what its files say. Raises SystemExit with our own complaint."""
    if model.startswith(SYNTHETIC):
        return model.removeprefix(SYNTHETIC)
    done = subprocess.run([sys.executable, "-c", _ASK, model], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1])
    return done.stdout.strip()


def measure(settings: dict[str, Any], work: Work) -> dict[str, Any]:
    if "predict" in settings:
        return planned(settings["model"], settings["predict"], work)
    from zimage_lite.bench import case as bench_case

    case = bench_case.Case(
        settings["model"], work.size, work.repeats, work.steps, work.vram_bytes, work.ram_bytes, settings["device"]
    )
    assert (work.prompt, work.seed) == (bench_case.PROMPT, 0)
    found = bench_case.measured(case)
    kept = ("outcome", "reason", "told", "dtype", "runs")
    told = {key: found[key] for key in kept if key in found}
    if found["process_peak_bytes"]:  # before the ceilings were measured
        told["process_peak_bytes"] = found["process_peak_bytes"]
    peaks = [
        phase["peak_vram_bytes"]
        for run in found["runs"]
        for phase in run["phases"].values()
        if "peak_vram_bytes" in phase
    ]
    if peaks:
        told["peak_vram_bytes"] = max(peaks)
    told["runs"] = [{key: run[key] for key in ("seconds", "step_seconds")} for run in found["runs"]]
    return told


def planned(model: str, tier_name: str, work: Work) -> dict[str, Any]:
    """For the card that stands for the tier, from its highest to its lowest power limit."""
    from zimage_lite.api import open_named
    from zimage_lite.bench.predict import cell
    from zimage_lite.bench.tiers import DONE, find_tier
    from zimage_lite.plan.model_sizes import model_of, true_model

    tier = find_tier(tier_name)
    name = model.removeprefix(SYNTHETIC)
    sizes = true_model(name) if name != model else model_of(open_named(model, {}))
    found = cell(sizes, name, tier.gpu, work.size, tier)
    if found["outcome"] != DONE:
        return {key: found[key] for key in ("outcome", "reason")}
    steps = found["phases"]["denoise"]["planned"]["pass_ms"]
    return {
        "outcome": DONE,
        "gpu": found["gpu"],
        "planned_seconds": found["seconds"]["range"],
        "planned_step_seconds": [round(ms / 1000, 4) for ms in steps],
        "process_peak_bytes": found["peak_vram_bytes"],
        "planned_ram_bytes": found["peak_ram_bytes"],
    }


if __name__ == "__main__":
    answer(measure)
