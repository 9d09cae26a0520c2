"""What a job may take of the memory, what was planned for it, and what it took."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..memory.plan import Budgets, Plan
    from ..pipeline.drawing import Pipeline


def memory_facts(pipeline: Pipeline, budgets: Budgets) -> dict[str, Any]:
    """Of the GPU's memory where one draws, else of the process's, in bytes: the most that any phase so far was planned
    to take, the most that one that is over took (None before that), and the ceiling."""
    gpu, phases = pipeline.hardware.device.type == "cuda", pipeline.meter.phases.values()
    used = max((phase.get("peak_reserved_bytes" if gpu else "peak_rss_bytes", 0) for phase in phases), default=0)
    return {**places(pipeline.plans.values(), budgets, gpu)[0], "used": int(used) or None}


def places(plans: Iterable[Plan], budgets: Budgets, gpu: bool) -> list[dict[str, Any]]:
    """The GPU's memory, if one draws, and the process's: the most that any of the plans takes there, and the ceiling,
    in bytes."""
    peaks = [(plan.peak_vram_bytes, plan.peak_ram_bytes) for plan in plans] or [(0, 0)]
    vram, ram = (int(max(most)) for most in zip(*peaks, strict=True))
    found = [{"place": "GPU memory", "planned": vram, "limit": int(budgets.vram_bytes)}] if gpu else []
    return [*found, {"place": "Memory", "planned": ram, "limit": int(budgets.ram_bytes)}]
