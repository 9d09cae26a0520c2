"""What the benchmarks of single ops share: times with a cold L2 cache, the card they were taken on, the report."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.testing import do_bench


def milliseconds(call: Callable[[], Any]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile; the L2 cache is cleared before each call."""
    low, middle, high = do_bench(call, warmup=100, rep=400, quantiles=[0.2, 0.5, 0.8])
    return low, middle, high


def card() -> dict[str, Any]:
    fields = "name,driver_version,power.limit,clocks.max.sm"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    values = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        **dict(zip(fields.split(","), values, strict=True)),
        "capability": torch.cuda.get_device_capability(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
    }


def report(rows: list[dict[str, Any]], out: Path | None) -> None:
    """Prints the rows, and as the last line the JSON that also goes to `out`."""
    for row in rows:
        print("  ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{value}" for key, value in row.items()))
    text = json.dumps({"card": card(), "rows": rows})
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    print(text)
