"""The same image through others, on the same machine in the same run: diffusers in its low-memory settings and
stable-diffusion.cpp, beside zimage-lite.

    zimage-lite quantize MODEL --to q8_0 -o Q8_0
    python benchmarks/peers/run.py --model MODEL --quantized Q8_0 synthetic:int8 --out benchmarks/results/NAME.json

MODEL is a folder in diffusers' layout with 16-bit weights, which diffusers loads; what --quantized names is drawn by
zimage-lite, and GGUF folders by the others, too. On CUDA all are held to the tier: torch by a hard cap, the others by
their own option, and the driver says what they took. Each case is a process of its own with a cold image first, and
its peak memory is the operating system's, which has to be Linux or macOS. What is not installed, does not fit or fails
stays as a row. The result is written after each case; the last line is the JSON that also goes to --out, and
`zimage-lite report` shows it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import with_diffusers
import with_sd_cpp
import with_zimage_lite
from harness import Case, Work, measured, obstacle, row_of, summary

from zimage_lite.bench.harness import told_tier
from zimage_lite.bench.tiers import DONE, STEPS, TIERS, Tier
from zimage_lite.checkpoint.output import replacing
from zimage_lite.report.others import PEERS

_ALONE = "nothing here to compare it with"
_MACHINE = "import json; from zimage_lite.bench.machine import *; print(json.dumps([machine_facts(), commit()]))"


def main() -> None:
    parser = arguments()
    args = parser.parse_args()
    if not hasattr(os, "wait4"):
        parser.error("needs Linux or macOS, which tell the peak memory of a process that has ended")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the process of a case, too
    machine, commit = asked()
    gpu = machine.get("gpu")
    tier = TIERS[args.tier]
    work = Work(args.size, args.steps, args.repeats, args.threads or machine["threads"])
    todo = [case for device in devices(args.device, gpu) for case in all_cases(args, device)]
    todo = [case for case in todo if any(fnmatch(case.name, pattern) for pattern in args.only)]
    reasons = obstacles(todo, gpu)
    print(first_line(todo, reasons, gpu), flush=True)
    result: dict[str, Any] = {
        "kind": PEERS,
        "machine": machine,
        "commit": commit,
        "tier": told_tier(tier),
        "size": args.size,
        "steps": args.steps,
        "repeats": args.repeats,
        "rows": [row_of(case, reason) for case, reason in zip(todo, reasons, strict=True)],
    }
    save(result, args.out)
    for case, reason, row in zip(todo, reasons, result["rows"], strict=True):
        row |= outcome(case, reason, within(work, tier, case), tier, args.case_limit)
        print(told(row), flush=True)
        save(result, args.out)
    print(json.dumps(result))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder in diffusers' layout, 16-bit weights")
    parser.add_argument(
        "--quantized", nargs="*", default=[], metavar="MODEL", help="written by quantize, or synthetic:"
    )
    parser.add_argument("--sd-cpp", metavar="PATH", help="the program of stable-diffusion.cpp")
    parser.add_argument("--tier", choices=TIERS, default="6gb", help="what CUDA is held to, or predicted for")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda; both where there is none")
    parser.add_argument("--size", type=int, default=1024, help="pixels each way")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--repeats", type=int, default=5, help="warm images; 0 where one takes minutes")
    parser.add_argument("--threads", type=int, help="of the CPU; default: as many as torch takes")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="of 'PROGRAM: SETTING'")
    parser.add_argument("--case-limit", type=float, default=1800, metavar="SECONDS")
    parser.add_argument("--out", type=Path)
    return parser


def asked() -> tuple[dict[str, Any], str | None]:
    """The machine and the commit, by a process of their own: torch is not loaded here, and no CUDA context made."""
    machine, commit = json.loads(subprocess.run([sys.executable, "-c", _MACHINE], stdout=-1, check=True).stdout)
    return machine, commit


def devices(named: str | None, gpu: str | None) -> tuple[str, ...]:
    if named:
        return (named,)
    return ("cuda",) if gpu else ("cuda", "cpu")


def all_cases(args: argparse.Namespace, device: str) -> list[Case]:
    model = str(Path(args.model).resolve()) if args.model else None
    quantized = [
        name if name.startswith(with_zimage_lite.SYNTHETIC) else str(Path(name).resolve()) for name in args.quantized
    ]
    folders = {
        with_zimage_lite.format_of(name): name for name in quantized if list(Path(name).glob("transformer/*.gguf"))
    }
    files = {name: with_sd_cpp.files_in(Path(folder))["diffusion_model"] for name, folder in folders.items()}
    return [
        *with_zimage_lite.cases([*quantized, *([model] if model else [])], device),
        *with_diffusers.cases(model, files, device),
        *with_sd_cpp.cases(folders, args.sd_cpp and str(Path(args.sd_cpp).resolve()), device),
    ]


def obstacles(todo: Sequence[Case], gpu: str | None) -> list[str | None]:
    """Of each case; zimage-lite is not measured where no other is, the tiers do that."""
    found = [obstacle(case, gpu) for case in todo]
    others = {case.device for case, reason in zip(todo, found, strict=True) if not reason and not ours(case)}
    return [
        reason or (_ALONE if ours(case) and case.device not in others else None)
        for case, reason in zip(todo, found, strict=True)
    ]


def ours(case: Case) -> bool:
    return case.peer == "zimage-lite"


def first_line(todo: Sequence[Case], reasons: Sequence[str | None], gpu: str | None) -> str:
    running = [case for case, reason in zip(todo, reasons, strict=True) if not reason]
    on = sorted({gpu or "" if case.device == "cuda" else "the CPU" for case in running})
    counts = {reason: reasons.count(reason) for reason in reasons if reason}
    left = "; ".join(f"{count}: {reason}" for reason, count in counts.items())
    planned = " (there, zimage-lite's figures are predictions)" if "needs CUDA" in counts else ""
    where = f" on {' and '.join(on)}" if on else ""
    return f"Measures {len(running)} of {len(todo)} cases{where}" + (f". Not run: {left}{planned}" if left else "")


def within(work: Work, tier: Tier, case: Case) -> Work:
    """Only CUDA is held to the tier."""
    return replace(work, vram_bytes=tier.vram_bytes, ram_bytes=tier.ram_bytes) if case.device == "cuda" else work


def outcome(case: Case, reason: str | None, work: Work, tier: Tier, limit: float) -> dict[str, Any]:
    """What is known of a case after its turn."""
    if reason is None:
        return {"reason": None, **summary(measured(case, work, limit))}
    if not (ours(case) and reason == "needs CUDA" and work.steps == STEPS):
        return {}
    planned = measured(replace(case, device="cpu", settings={**case.settings, "predict": tier.name}), work, limit)
    del planned["peak_rss_bytes"]  # of planning
    return {"prediction": True, **planned} if planned["outcome"] == DONE else planned


def told(row: dict[str, Any]) -> str:
    """A line for people."""
    start = f"{row['peer']}, {row['setting']}, {row['device']}: "
    if row["outcome"] != DONE:
        return start + f"{row['outcome']}{': ' + row['reason'] if row['reason'] else ''}"
    if row["prediction"]:
        fast, slow = row["planned_seconds"]
        return start + f"prediction for {row['gpu']}: {fast:.1f} to {slow:.1f} s an image"
    step, vram = row.get("step_seconds"), row.get("process_peak_bytes")
    parts = [f"{row['seconds'].get('warm', {}).get('median', row['seconds']['cold']):.2f} s an image"]
    parts += [f"{step['median']:.3f} s a step"] if step else []
    parts += [f"{vram / 2**30:.2f} GiB of GPU memory"] if vram else []
    return start + ", ".join([*parts, f"{row['peak_rss_bytes'] / 1e9:.2f} GB of RAM"])


def save(result: dict[str, Any], out: Path | None) -> None:
    if out:
        with replacing(out) as partial:
            partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
