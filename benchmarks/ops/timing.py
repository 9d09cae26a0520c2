"""What the benchmarks of single ops share: a GPU or a clear end, times, the card they were taken on, the report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from zimage_lite.bench.machine import commit, machine_facts

Times = tuple[float, float, float]  # 20th, 50th and 80th percentile
QUANTILES = [0.2, 0.5, 0.8]


def need_cuda() -> None:
    """Ends with 2 where there is no GPU: what these scripts say cannot be predicted."""
    if not torch.cuda.is_available():
        print("error: this needs a CUDA GPU, and torch finds none", file=sys.stderr)
        raise SystemExit(2)


def milliseconds(call: Callable[[], Any], rep: int = 400) -> Times:
    """The L2 cache is cleared before each call; as many calls as take `rep` ms."""
    from triton.testing import do_bench

    low, middle, high = do_bench(call, warmup=100, rep=rep, quantiles=QUANTILES)
    return low, middle, high


def cold_milliseconds(calls: Sequence[Callable[[], Any]]) -> Times:
    """Of one of these calls, which do the same on buffers of their own: enough of them that none is in the L2 cache
    when its turn comes again.

    For passes of a few us: all run in one CUDA graph, since Python takes 20 to 50 us to launch one, and there is no
    event between them. What a call returns lives until all are done, so that no two write to the same place.
    """
    from triton.testing import do_bench_cudagraph

    all_of_them = do_bench_cudagraph(lambda: [call() for call in calls], quantiles=QUANTILES)
    low, middle, high = (one / len(calls) for one in all_of_them)
    return low, middle, high


def sets_for(n_bytes: int, l2_bytes: int) -> int:
    """How many sets of buffers so large keep each other out of the cache: four times what it holds."""
    return max(-(-4 * l2_bytes // n_bytes), 2)


def spread(times: Times) -> dict[str, float]:
    return dict(zip(("ms_p20", "ms", "ms_p80"), times, strict=True))


def card() -> dict[str, Any]:
    """As far as it can be told: without git there is no commit, without nvidia-smi no limit of power."""
    return {**machine_facts(), "commit": commit()}


def report(rows: Iterable[dict[str, Any]], out: Path | None) -> list[dict[str, Any]]:
    """Prints the rows as they come, and as the last line the JSON, which is in `out` after each of them: a script that
    runs out of time leaves what it had."""
    result: dict[str, Any] = {"card": card(), "rows": []}
    for row in rows:
        print("  ".join(f"{key} {_figure(value)}" for key, value in row.items()), flush=True)
        result["rows"].append(row)
        if out is not None:
            out.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return result["rows"]


def _figure(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
