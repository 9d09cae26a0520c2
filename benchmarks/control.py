"""What a ControlNet takes beside the whole model, on this CPU: the full-size one with random weights, in 8 bits, draws
one image alone and with each ControlNet of released size, within the RAM named, each in a process of its own.

    python benchmarks/control.py --out benchmarks/results/control/NAME.json

Weights are made in memory, so the disk takes no time. Peak memory is the operating system's figure for the finished
process. Seconds are of the median step but the first, which also loads. The last line is the JSON that also goes to
--out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from full_size import machine, run
from PIL import Image

from zimage_lite.bench.machine import commit

KINDS = ("", "2.1-lite", "2.1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--to", default="int8")
    parser.add_argument("--ram", nargs="+", default=["6GB", "8GB"])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    report: dict[str, Any] = {"machine": machine(), "commit": commit(), "to": args.to, "size": args.size, "runs": []}
    with tempfile.TemporaryDirectory() as work:
        for ram, kind in product(args.ram, KINDS):
            report["runs"].append(drawn(args, Path(work), kind, ram))
            print(json.dumps(report["runs"][-1]), flush=True)
            if args.out:
                args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def drawn(args: argparse.Namespace, work: Path, kind: str, ram: str) -> dict[str, Any]:
    Image.linear_gradient("L").save(work / "hint.png")
    size = ("--width", args.size, "--height", args.size, "--steps", args.steps, "--ram", ram, "--no-cache")
    control = ("--control", f"synthetic:{kind}/{args.to}", "--control-image", "hint.png") if kind else ()
    out = ("-o", f"{kind}-{ram}.png")
    found = run(work, "generate", "a red circle", "--model", f"synthetic:{args.to}", *out, *size, *control)
    blocks = found["phases"]["denoise"]["planned"]["blocks"]
    return {
        "control": kind, "ram": ram, "seconds_per_step": round(median(found["step_seconds"][1:]), 2),
        "step_seconds": found["step_seconds"], "blocks": blocks, "wall_seconds": found["wall_seconds"],
        "peak_bytes": found["max_rss_bytes"], "planned_bytes": found["planned_rss_bytes"],
    }  # fmt: skip


if __name__ == "__main__":
    main()
