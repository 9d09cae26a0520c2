"""Draws the same image within several --ram, and compares the peak with the budget and with the plan.

    python tools/make_checkpoint.py CHECKPOINT --size full --dtype bf16
    zimage-lite quantize CHECKPOINT --to int8 -o FOLDER/int8
    python benchmarks/budgets.py FOLDER --formats int8 --out benchmarks/results/NAME.json

Each run is a process of its own on the CPU. Its peak memory is the operating system's figure for the finished process,
so it misses nothing. Fails if a peak is above its budget, or off its plan by more than 5 %. What could not be planned
stays in the table. The last line is the JSON that also goes to --out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from full_size import machine

from zimage_lite.bench.machine import commit

MOST_OFF = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds a model folder for each format, named after it")
    parser.add_argument("--formats", nargs="+", default=["int8", "q4_k_m"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 512])
    parser.add_argument("--ram", nargs="+", type=float, default=[4, 6, 8, 12], help="GB")
    parser.add_argument("--steps", type=int, default=2, help="the first one loads, the others show the pace")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {"machine": machine(), "commit": commit(), "steps": args.steps, "runs": []}
    for size in args.sizes:
        for name in args.formats:
            for ram in args.ram:
                made = run(args.folder / name, name, size, ram, args.steps)
                report["runs"].append(made)
                print(told(made), flush=True)
                if args.out:  # after each, so that nothing is lost
                    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    sys.exit(not all(made["kept"] for made in report["runs"]))


def run(model: Path, name: str, size: int, ram: float, steps: int) -> dict[str, Any]:
    facts = {"format": name, "size": size, "ram_bytes": round(ram * 1e9)}
    command = [sys.executable, "-m", "zimage_lite", "generate", "a red circle", "--model", str(model), "--json"]
    command += ["--device", "cpu", "--no-cache", "--width", str(size), "--height", str(size), "--steps", str(steps)]
    command += ["--ram", f"{ram}GB", "-o", str(model.parent / f"{name}-{size}.png")]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    printed, complaint = process.communicate()
    seconds = round(time.perf_counter() - start, 1)
    if process.returncode:
        return {**facts, "refused": complaint.strip().splitlines()[-1], "kept": process.returncode == 3}
    found = json.loads(printed)
    peak, planned = found["peak_rss_bytes"], found["planned_rss_bytes"]
    kept = peak <= ram * 1e9 and abs(planned - peak) <= MOST_OFF * peak
    shown = {key: found[key] for key in ("peak_rss_bytes", "planned_rss_bytes", "step_seconds", "phases")}
    return {**facts, "wall_seconds": seconds, **shown, "kept": kept}


def told(made: dict[str, Any]) -> str:
    start = f"{made['format']:<8}{made['size']:>5}  {made['ram_bytes'] / 1e9:>4g} GB  "
    if "refused" in made:
        return start + made["refused"]
    peak, planned = made["peak_rss_bytes"], made["planned_rss_bytes"]
    blocks = made["phases"]["denoise"]["planned"]["blocks"]
    return start + (
        f"peak {peak / 1e9:.2f}, planned {planned / 1e9:.2f} ({planned / peak - 1:+.1%}); {blocks['device']} of "
        f"{sum(blocks.values())} blocks stay; steps {made['step_seconds']} s, in all {made['wall_seconds']} s"
        f"{'' if made['kept'] else '  NOT KEPT'}"
    )


if __name__ == "__main__":
    main()
