"""Cells of a tier's table that are planned instead of run: the same planner as `zimage-lite plan`, at the highest and
at the lowest power limit of a card. Pure arithmetic over sizes; nothing is measured here."""

from __future__ import annotations

from typing import Any

from ..errors import BudgetError
from ..memory.gpus import Gpu
from ..memory.machine import (
    CPU_TFLOPS,
    CUDA_CONTEXT_BYTES,
    DISK_GBPS,
    EFFICIENCY_8,
    EFFICIENCY_16,
    EFFICIENCY_ATTENTION,
    EFFICIENCY_MEMORY,
    HOST_COPY_GBPS,
    VRAM_MARGIN_BYTES,
    at_both_limits,
)
from ..memory.plan import Plan
from ..memory.planner import budgets_in_force, plan_phases
from ..plan.job import Job
from ..plan.model_sizes import Model
from ..plan.prediction import phases
from .tiers import DONE, NO_FIT, STEPS, Tier

_GIB = 2**30
_SWEEP_SIZE = 1024
_SWEEP_STEPS = 6  # budgets, evenly from 2 GB up to what the card has free


def assumptions() -> list[str]:
    """What the roofline takes for granted, in words."""
    return [
        f"16-bit products reach {EFFICIENCY_16:.0%}, 8-bit ones {EFFICIENCY_8:.0%}, attention "
        f"{EFFICIENCY_ATTENTION:.0%} and memory {EFFICIENCY_MEMORY:.0%} of the card's peak",
        "int8, and other integer formats once re-encoded, compute on 8-bit matrix units, as the kernels are meant to",
        f"disk {DISK_GBPS:g} GB/s, pageable to pinned memory {HOST_COPY_GBPS:g} GB/s, CPU {CPU_TFLOPS:g} TFLOP/s",
        f"the CUDA context takes {CUDA_CONTEXT_BYTES / 1e9:.2f} GB, and {VRAM_MARGIN_BYTES / 1e9:.2f} GB stay free",
        "the range is from the highest to the lowest power limit that the maker allows",
    ]


def plans(model: Model, gpu: Gpu, size: int, ram_bytes: int, vram_bytes: int | None = None) -> list[list[Plan]]:
    """Of encode, denoise and decode: at the highest power limit, and at the lowest. Raises BudgetError."""
    machines = at_both_limits(gpu, ram_bytes, vram_bytes)
    todo = phases(model, Job(size, size, steps=STEPS), machines[0])
    return [plan_phases(todo, there, budgets_in_force(there, None, ram_bytes)) for there in machines]


def cell(model: Model, format_name: str, gpu: Gpu, size: int, tier: Tier) -> dict[str, Any]:
    """One row of the table."""
    facts = {"prediction": True, "model": model.name, "format": format_name, "gpu": gpu.name, "size": [size, size]}
    facts |= {"watts": list(gpu.watts), "link_gbps": gpu.link_gbps}
    try:
        fast, slow = plans(model, gpu, size, tier.ram_bytes)
    except BudgetError as error:
        return {**facts, "outcome": NO_FIT, "reason": str(error)}
    rows = {}
    for one, other in zip(fast, slow, strict=True):
        times = {name: [getattr(one, name), getattr(other, name)] for name in ("total_ms", "pass_ms")}
        rows[one.phase] = {"planned": {**one.facts(), **_rounded(times)}}
    return {
        **facts,
        "outcome": DONE,
        "seconds": {"range": [_seconds(fast), _seconds(slow)]},
        "peak_vram_bytes": max(plan.peak_vram_bytes for plan in fast),
        "peak_ram_bytes": max(plan.peak_ram_bytes for plan in fast),
        "phases": rows,
    }


def sweep(model: Model, format_name: str, tier: Tier) -> dict[str, Any]:
    """Seconds per image against the budget of VRAM, on the tier's card."""
    low, high = 2 * 10**9, tier.vram_bytes - VRAM_MARGIN_BYTES
    points = []
    for i in range(_SWEEP_STEPS):
        budget = round(low + (high - low) * i / (_SWEEP_STEPS - 1))
        try:
            fast, slow = plans(model, tier.gpu, _SWEEP_SIZE, tier.ram_bytes, budget)
        except BudgetError:
            continue
        points.append({"vram_bytes": budget, "range": [_seconds(fast), _seconds(slow)]})
    return {"format": format_name, "gpu": tier.gpu.name, "size": [_SWEEP_SIZE, _SWEEP_SIZE], "points": points}


def told(row: dict[str, Any]) -> str:
    """A line for people."""
    start = f"{row['format']:<8}{row['size'][0]:>5}  {row['gpu']:<24}"
    if row["outcome"] != DONE:
        return f"{start}{row['outcome']}: {row['reason']}"
    fast, slow = row["seconds"]["range"]
    bound = row["phases"]["denoise"]["planned"]["bound_by"]
    time = f"{fast:.1f} s" if fast == slow else f"{fast:.1f}-{slow:.1f} s"
    return (
        f"{start}{time:>14}  {row['peak_vram_bytes'] / _GIB:6.2f} GiB of GPU memory  "
        f"{row['peak_ram_bytes'] / 1e9:5.2f} GB of RAM  bound by {bound}"
    )


def _seconds(found: list[Plan]) -> float:
    return round(sum(plan.total_ms for plan in found) / 1000, 2)


def _rounded(times: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [round(ms, 1) for ms in pair] for name, pair in times.items()}
