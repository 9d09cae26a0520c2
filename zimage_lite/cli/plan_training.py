"""zimage-lite plan --train: what `train-lora` would take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..config import TrainOptions
from ..units import format_gb

if TYPE_CHECKING:
    from ..memory.machine import Machine
    from ..memory.plan import Plan
    from ..plan.model_sizes import Model

_HOMES = {"device": "stay", "pinned": "in pinned RAM", "pageable": "in pageable RAM", "file": "from the file each time"}


def predict_training(
    model: Model, gpu_name: str, machines: Sequence[Machine], limits: tuple[int | None, int | None],
    options: TrainOptions, preserve: tuple[Sequence[str], Sequence[str]], show: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """machines: the GPU at its highest and its lowest power limit. preserve: words, and prompts. Returns
    what --json prints. Raises BudgetError."""
    from ..memory.planner import budgets_in_force, plan_phases
    from ..plan.training import PRESERVED_SHARE, TrainJob, preserved_pictures, ways_to_train

    job = TrainJob(options.resolution, options.rank, options.batch, options.optimizer)
    if preserved := preserved_pictures(job.pictures, *preserve):
        pictures, (tokens, *_) = job.pictures + preserved, job.caption_tokens
        job = replace(job, pictures=pictures, caption_tokens=(tokens,) * pictures, preserved=PRESERVED_SHARE)
    wide = [replace(one, gpu_dtype="fp32") if one.gpu_dtype == "fp16" else one for one in machines]
    budgets = budgets_in_force(wide[0], *limits)
    (fast,), (slow,) = (plan_phases([ways_to_train(model, job, one)], one, budgets) for one in wide)
    steps = [2 * plan.pass_ms for plan in (fast, slow)]
    facts = [model.name, f"a LoRA of rank {job.rank}", f"{options.resolution}x{options.resolution}"]
    facts += [f"{job.batch} a step"] * (job.batch > 1) + [f"{preserved} pictures preserved"] * (preserved > 0)
    show(f"A prediction, nothing was run: {', '.join(facts)}, {gpu_name}")
    show(f"a step: {_seconds(*steps)}, bound by {fast.bound_by}; 1000 steps: {_minutes(*steps)}")
    show(
        f"memory: {fast.peak_vram_bytes / 2**30:.2f} GiB of the GPU's, of {budgets.vram_bytes / 2**30:.2f} that it may "
        f"take, {format_gb(fast.peak_ram_bytes)} of RAM"
    )
    show(f"{len(fast.homes)} blocks: {_where(fast)}")
    show("beside them: " + ", ".join(f"{name} {format_gb(n_bytes)}" for name, n_bytes in fast.fixed.items()))
    return {
        "prediction": True, "model": model.name, "gpu": gpu_name, "rank": options.rank,
        "resolution": options.resolution, "batch": options.batch, "preserved": preserved,
        **fast.facts(), "step_ms": steps,
    }  # fmt: skip


def _where(plan: Plan) -> str:
    homes = list(plan.homes.values())
    counts = [f"{homes.count(home)} {text}" for home, text in _HOMES.items() if home in homes]
    slots = f"; {plan.slots} slots of {format_gb(plan.slot_bytes)}" if plan.slots else ""
    return ", ".join(counts) + slots


def _seconds(fast_ms: float, slow_ms: float) -> str:
    """From the highest to the lowest power limit."""
    fast, slow = f"{fast_ms / 1000:.2f}", f"{slow_ms / 1000:.2f}"
    return f"{fast} s" if fast == slow else f"{fast} to {slow} s"


def _minutes(fast_ms: float, slow_ms: float) -> str:
    fast, slow = f"{fast_ms / 60:.0f}", f"{slow_ms / 60:.0f}"
    return f"{fast} min" if fast == slow else f"{fast} to {slow} min"
