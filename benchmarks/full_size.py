"""Converts a full-size checkpoint and draws one image from each result, each in a process of its own.

    python tools/make_checkpoint.py CHECKPOINT --size full --dtype bf16
    python benchmarks/full_size.py CHECKPOINT --work FOLDER --out benchmarks/results/NAME.json

Peak memory is the operating system's figure for the finished process, so it misses nothing. FOLDER needs room for the
largest output, 12 GB; each one is deleted after its image. The last line is the JSON that also goes to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from zimage_lite import __version__
from zimage_lite.bench.machine import commit

FORMATS = ("q8_0", "q4_0", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ram", default="6GB")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    runs = []
    for name in args.formats:
        runs.append(run(args.work, "quantize", args.checkpoint.resolve(), "-o", name, "--to", name))
        size = ("--width", args.size, "--height", args.size, "--steps", args.steps)
        image = ("--model", name, "-o", f"{name}.png")
        runs.append(run(args.work, "generate", "a red circle", *image, "--ram", args.ram, "--no-cache", *size))
        shutil.rmtree(args.work / name)
    report = {"machine": machine(), "version": __version__, "commit": commit(), "ram": args.ram, "runs": runs}
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def run(work: Path, *args: object) -> dict[str, Any]:
    """One command in the folder `work` -> what it printed as JSON, with wall time and peak memory seen from outside."""
    command = [sys.executable, "-m", "zimage_lite", *map(str, args), "--json"]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    outside = {"wall_seconds": round(time.perf_counter() - start, 1), "max_rss_bytes": usage.ru_maxrss * 1024}
    told = [arg.name if isinstance(arg, Path) else str(arg) for arg in args]  # where it lies is nobody's business
    return {"command": told, **outside, **json.loads(printed)}


def machine() -> dict[str, Any]:
    import torch

    model = next(
        (line.split(":")[1].strip() for line in cpuinfo() if line.startswith("model name")), platform.processor()
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": model, "threads": os.cpu_count(), "memory_bytes": memory, "torch": torch.__version__}


def cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    main()
