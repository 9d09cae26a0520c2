"""How much of the copying a trace of torch.profiler shows beside computing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Spans = list[tuple[float, float]]


def overlap(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the time in which weights were copied, the share in which something was computed, too."""
    copies, kernels, kinds = [], [], dict[str, int]()
    for event in events:
        span = (event.get("ts", 0.0), event.get("ts", 0.0) + event.get("dur", 0.0))
        if event.get("cat") == "gpu_memcpy" and "HtoD" in event["name"]:
            copies.append(span)
            kinds[event["name"]] = kinds.get(event["name"], 0) + int(event.get("args", {}).get("bytes", 0))
        elif event.get("cat") == "kernel":
            kernels.append(span)
    copies, kernels = union(copies), union(kernels)
    both, copying = union_length(common(copies, kernels)), union_length(copies)
    spans = copies + kernels
    window = max(end for _, end in spans) - min(start for start, _ in spans) if spans else 0.0
    return {
        "window_ms": window / 1e3,
        "copy_ms": copying / 1e3,
        "compute_ms": union_length(kernels) / 1e3,
        "both_ms": both / 1e3,
        "overlap": round(both / copying, 4) if copying else None,
        "copied_bytes": kinds,
    }


def union(spans: Spans) -> Spans:
    """Disjoint, in order."""
    found: Spans = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def common(a: Spans, b: Spans) -> Spans:
    """Of two unions."""
    found, i, j = Spans(), 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            found.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def union_length(spans: Spans) -> float:
    return sum(end - start for start, end in spans)
