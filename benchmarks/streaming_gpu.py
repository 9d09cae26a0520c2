"""Runs full-size synthetic models on a GPU under a hard cap, and beside that with all weights resident.

    python benchmarks/streaming_gpu.py --out benchmarks/results/NAME.json
    python benchmarks/streaming_gpu.py --dry            a tiny model on the CPU, to see that this script works

It needs torch, numpy, numba, psutil and tokenizers; where the package is not installed, PYTHONPATH=.:kernels.

First a small model must give the same picture on the GPU as on the CPU, to rounding, and streamed the same as resident,
bit for bit. Each case is a process of its own: 8 steps at that --vram, to which the pipeline holds torch's allocator,
and what was measured beside what was planned; the steady time is the median from step 2 on. The process's memory is
NVML's figure for GPU 0, less what others had before. Then 4 steps are drawn again, and the last two of them profiled,
which takes memory and time of its own.

Exits with 1 if the check fails, or if a case fails, plans again for want of memory or takes more than its cap. --out is
written after each case; the last line is the same JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from full_size import machine
from gpu_trace import overlap

from zimage_lite.bench.machine import commit
from zimage_lite.config import GenerateOptions, RuntimeOptions, TextEncoderConfig, TransformerConfig, VaeConfig
from zimage_lite.convert.synthetic import open_synthetic
from zimage_lite.errors import BudgetError
from zimage_lite.memory.meter import peak_rss_bytes
from zimage_lite.memory.nvml import Nvml, Peak
from zimage_lite.pipeline.drawing import Pipeline
from zimage_lite.units import parse_bytes

GIB = 2**30
PROMPT = "a red circle on a blue background"
STEPS, PROFILED_STEPS, PROFILED_FROM = 8, 4, 2
DRY_SLACK_BYTES = 400_000_000  # what a process keeps after its first picture, and is then counted as its own
SMALL = (  # 32 blocks of 7 MB in int8, so that budgets, which are told to 0.1 GB, make a difference
    TransformerConfig(dim=768, n_heads=6, cap_feat_dim=256),
    TextEncoderConfig(
        vocab_size=640, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, intermediate_size=512,
    ),
    VaeConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--vram", type=float, nargs="*", default=[3, 4, 5, 7], help="caps in GiB")
    parser.add_argument("--formats", nargs="+", default=["int8", "int4"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 512])
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which no case is started")
    parser.add_argument("--case-limit", type=float, default=400, help="seconds for one case")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--case", help="JSON of one case; used by the others")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(**json.loads(args.case))))
        return
    if not args.dry and not torch.cuda.is_available():
        print("error: this needs a CUDA GPU, and torch finds none; --dry does without", file=sys.stderr)
        sys.exit(2)
    device = "cpu" if args.dry else "cuda"
    report: dict[str, Any] = {
        "machine": machine(), "gpu": None if args.dry else gpu(), "commit": commit(), "check": {}, "cases": []
    }  # fmt: skip
    start = time.perf_counter()
    for name in args.formats:
        report["check"][name] = in_process({"check": True, "name": name, "device": device}, args.case_limit)
        print(name, report["check"][name], flush=True)
        save(report, args.out)
    print("format  size  cap GiB  step ms  resident  planned  wait s  overlap  GPU peak GiB  planned", flush=True)
    for case in cases(args, device):
        if time.perf_counter() - start > args.limit:
            case["failed"] = "not started: out of time"
        else:
            case |= in_process(case, args.case_limit)
        report["cases"].append(case)
        save(report, args.out)
        show(case, report["cases"])
    problems = [name for name, found in report["check"].items() if not found.get("right")]
    problems += [f"{c['name']} {c['size']} {c['cap_bytes']}: {why}" for c in report["cases"] if (why := wrong(c))]
    report["problems"] = problems
    save(report, args.out)
    print(*problems, sep="\n")
    print(json.dumps(report))
    sys.exit(bool(problems))


def cases(args: argparse.Namespace, device: str) -> Iterable[dict[str, Any]]:
    """Without a cap first. On the CPU the cap is one of RAM, a little above the smallest that works, and nothing is
    held to it: so small a model is lost in what Python takes."""
    caps: list[Any] = [None, *([0] if args.dry else [round(gib * GIB) for gib in args.vram])]
    sizes = [64] if args.dry else args.sizes
    for size in sizes:
        for name in args.formats:
            for cap in caps:
                yield {"name": name, "size": size, "cap_bytes": cap, "device": device}


def in_process(case: dict[str, Any], limit: float) -> dict[str, Any]:
    """-> what it printed last, or {"failed": why}."""
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {limit:g} s"}
    if done.returncode:
        return {"failed": done.stderr.strip()[-2000:]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def run_case(name: str, device: str, size: int = 0, cap_bytes: int | None = None, check: bool = False) -> dict:
    if check:
        return checked(name, device)
    return measured(name, device, size, cap_bytes)


def checked(name: str, device: str) -> dict[str, Any]:
    """A small model in float32: on the CPU and on the device, resident and streamed.

    Two devices add up in different orders, which changes the last of 24 bits of a sum; 3 steps through 32 blocks of
    random weights make that 1e-4 at most, where 1/255 is one level of a pixel. So some that are near the edge between
    two levels may be one off, and no more. Other weights, in contrast, change a pixel by dozens of levels.
    """
    torch.backends.cudnn.allow_tf32 = False
    there, resident = small(name, device, None)
    budget = smallest_budget(name, device)
    squeezed, streamed = small(name, device, budget)
    cpu, _ = small(name, "cpu", None)
    apart = (there.int() - cpu.int()).abs()
    same_ways = all(
        (plan.device, plan.way) == (resident.plans[phase].device, resident.plans[phase].way)
        for phase, plan in streamed.plans.items()
    )
    found = {
        "budget": budget,
        "streamed_blocks": len(streamed.plans["denoise"].streamed),
        "resident_blocks": len(resident.plans["denoise"].resident),
        "same_ways": same_ways,
        "streamed_is_resident": torch.equal(squeezed, there),
        "levels_from_cpu": int(apart.max()),
        "share_of_other_pixels": round((apart > 0).float().mean().item(), 5),
        "image_std": round(there.float().std().item(), 1),
    }
    right = found["streamed_blocks"] and not resident.plans["denoise"].streamed and same_ways
    right = right and found["streamed_is_resident"] and found["levels_from_cpu"] <= 1
    return {**found, "right": bool(right and found["share_of_other_pixels"] < 0.05 and found["image_std"] > 20)}


def small(name: str, device: str, budget: str | None) -> tuple[torch.Tensor, Pipeline]:
    limit = {"ram_bytes" if device == "cpu" else "vram_bytes": parse_bytes(budget) if budget else None}
    options = RuntimeOptions(device=device, dtype="fp32", backend="reference", cache=False, **limit)
    pipeline = Pipeline(open_synthetic(f"synthetic:{name}", configs=SMALL), options)
    return pipeline.generate([GenerateOptions(PROMPT, 128, 128, steps=3)])[0], pipeline


def smallest_budget(name: str, device: str) -> str:
    """As the refusal of a smaller one names it."""
    try:
        small(name, device, "1MB")
    except BudgetError as error:
        words = str(error).split()
        return words[words.index("--ram" if device == "cpu" else "--vram", words.index("smallest")) + 1].strip(".,")
    raise AssertionError("1 MB was enough")


def measured(name: str, device: str, size: int, cap_bytes: int | None) -> dict[str, Any]:
    cuda = device == "cuda"
    nvml = Nvml() if cuda else None
    before = nvml.used() if nvml else 0
    facts: dict[str, Any] = {}
    if cuda:
        torch.zeros(1, device=device)
        facts = {"context_bytes": nvml.used() - before if nvml else None}
        model = open_synthetic(f"synthetic:{name}")
        options = RuntimeOptions(device=device, vram_bytes=cap_bytes, cache=False)
    else:
        model = open_synthetic(f"synthetic:{name}", configs=SMALL)
        cap_bytes = parse_bytes(smallest_budget(name, device)) + DRY_SLACK_BYTES if cap_bytes is not None else None
        options = RuntimeOptions(device=device, ram_bytes=cap_bytes, cache=False)
    told: list[str] = []
    pipeline, steps, profiled = Pipeline(model, options, tell=told.append), Steps(), ProfiledSteps()
    start = time.perf_counter()
    with Peak(nvml) as peak:
        image = pipeline.generate([GenerateOptions(PROMPT, size, size, steps=STEPS)], steps)[0]
    seconds = time.perf_counter() - start
    between = [1000 * (b - a) for a, b in pairwise(steps.done)]
    plans, phases = {phase: plan.facts() for phase, plan in pipeline.plans.items()}, pipeline.meter.phases
    planned = max(p["peak_vram_bytes" if cuda else "peak_ram_bytes"] for p in plans.values())
    reserved = max((p.get("peak_reserved_bytes", 0) for p in phases.values()), default=0)
    stats = torch.cuda.memory_stats() if cuda else {}
    own_bytes = peak.bytes - before if nvml and nvml.works else None
    rss_bytes = peak_rss_bytes()
    pipeline.generate([GenerateOptions(PROMPT, size, size, steps=PROFILED_STEPS)], profiled)
    return {
        **facts,
        "allocator_retries": stats.get("num_alloc_retries"), "allocator_settings": os.environ.get("PYTORCH_ALLOC_CONF"),
        "told": told, "seconds": round(seconds, 2), "between_steps_ms": [round(ms, 1) for ms in between],
        "steady_ms": round(statistics.median(between), 1), "peak_reserved_bytes": reserved or None,
        "process_peak_bytes": own_bytes, "peak_rss_bytes": rss_bytes, "planned_peak_bytes": planned,
        "profile": profiled.found, "plans": plans, "phases": phases,
        "real_cap_bytes": cap_bytes, "image_std": round(image.float().std().item(), 1),
    }  # fmt: skip


class Steps:
    """Progress of a pipeline: when each step was done."""

    def __init__(self) -> None:
        self.done: list[float] = []

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase == "denoise":
            self.done.append(time.perf_counter())


class ProfiledSteps:
    """Progress of a pipeline: profiles its last steps."""

    def __init__(self) -> None:
        self.found: dict[str, Any] | None = None
        kinds = torch.profiler.ProfilerActivity
        self._profiler = torch.profiler.profile(activities=[kinds.CUDA if torch.cuda.is_available() else kinds.CPU])

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase == "denoise" and done == PROFILED_FROM:
            self._profiler.start()
        elif phase == "denoise" and done == total:
            self._profiler.stop()
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "trace.json"
                self._profiler.export_chrome_trace(str(path))
                self.found = overlap(json.loads(path.read_text())["traceEvents"])


def wrong(case: dict[str, Any]) -> str | None:
    if case.get("failed"):
        return str(case["failed"])
    if case["told"]:
        return "; ".join(case["told"])
    cap, peak = case["real_cap_bytes"], case["process_peak_bytes"]
    return f"took {(peak - cap) / 1e6:.0f} MB more than its cap" if cap and peak and peak > cap else None


def show(case: dict[str, Any], before: Sequence[dict[str, Any]]) -> None:
    what = f"{case['name']:6} {case['size']:5}"
    if case.get("failed"):
        print(what, case["cap_bytes"], "failed:", case["failed"][-300:], flush=True)
        return
    resident = [c for c in before if (c["name"], c["size"], c["cap_bytes"]) == (case["name"], case["size"], None)]
    base = resident[0].get("steady_ms", 0.0) if resident else 0.0
    cap, profile = case["real_cap_bytes"], case["profile"] or {}
    peak = case["process_peak_bytes"] or (case["peak_reserved_bytes"] or 0) + (case.get("context_bytes") or 0)
    denoise = case["plans"]["denoise"]
    print(
        f"{what} {cap / GIB if cap else 0:8.2f} {case['steady_ms']:8.1f} {base:9.1f} {denoise['pass_ms']:8.1f}"
        f" {case['phases']['denoise']['wait_seconds']:7.2f} {profile.get('overlap')!s:>8} {peak / GIB:13.2f}"
        f" {case['planned_peak_bytes'] / GIB:8.2f}  {wrong(case) or ''}",
        flush=True,
    )


def gpu() -> dict[str, Any]:
    """In a process of its own, so that this one holds nothing of it."""
    ask = (
        "import torch, json; p = torch.cuda.get_device_properties(0); print(json.dumps({'name': p.name, "
        "'bytes': p.total_memory, 'cuda': torch.version.cuda, 'capability': [p.major, p.minor]}))"
    )
    return dict(json.loads(subprocess.run([sys.executable, "-c", ask], stdout=subprocess.PIPE, check=True).stdout))


def save(report: dict[str, Any], path: Path | None) -> None:
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
