"""What a job may take of the memory, what was planned for it, and what it took."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..memory.plan import Budgets
    from ..pipeline.drawing import Pipeline


def memory_facts(pipeline: Pipeline, budgets: Budgets) -> dict[str, str | int | None]:
    """Of the GPU's memory where one draws, else of the process's, in bytes: the most that any phase so far was planned
    to take, the most that one that is over took (None before that), and the ceiling."""
    gpu = pipeline.hardware.device.type == "cuda"
    plans, phases = pipeline.plans.values(), pipeline.meter.phases.values()
    planned = max((plan.peak_vram_bytes if gpu else plan.peak_ram_bytes for plan in plans), default=0)
    used = max((phase.get("peak_reserved_bytes" if gpu else "peak_rss_bytes", 0) for phase in phases), default=0)
    limit = budgets.vram_bytes if gpu else budgets.ram_bytes
    place = "GPU memory" if gpu else "Memory"
    return {"place": place, "planned": int(planned), "used": int(used) or None, "limit": int(limit)}
