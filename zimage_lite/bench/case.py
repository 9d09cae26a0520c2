"""One measured case in a process of its own, so that its peaks are nobody else's: python -m zimage_lite.bench.case JSON

The first image is the cold one: weights are read, kernels compiled, memory asked for. The others are warm. A hard cap
holds torch's allocator, and so the process, to what a smaller card would have free. What goes out on stdout is JSON, a
line {"run": ...} after each image, and last the result; what went out of memory is a result, too.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
import torch

from ..api import open_named
from ..config import GenerateOptions, RuntimeOptions
from ..errors import BudgetError
from ..memory.failures import is_out_of_memory
from ..memory.hardware import machine_here
from ..memory.machine import CUDA_CONTEXT_BYTES, VRAM_MARGIN_BYTES
from ..memory.meter import peak_rss_bytes
from ..memory.nvml import Nvml, Peak
from ..pipeline.drawing import Pipeline
from ..plan.job import Job
from ..plan.prediction import phases
from .ceilings import Ceilings, PhaseWork, measure
from .tiers import DONE, NO_FIT, OOM

PROMPT = "a red circle on a blue background"


@dataclass(frozen=True)
class Case:
    """model: as on the command line; size: pixels each way, None for the model's own. vram_bytes: the hard cap, of
    which a margin is left when planning. ram_bytes: only planned for."""

    model: str
    size: int | None
    repeats: int
    steps: int
    vram_bytes: int | None = None
    ram_bytes: int | None = None
    device: str = "auto"


def measured(case: Case, note: Callable[[dict[str, Any]], None] = lambda run: None) -> dict[str, Any]:
    """-> outcome, runs, plans, work, ceilings and peaks of the process, as plain data. note: told each run at once."""
    started = psutil.Process().create_time()
    nvml = Nvml() if torch.cuda.is_available() and case.device in ("auto", "cuda") else None
    before = nvml.used() if nvml else 0
    context = _take_context(case, nvml, before) if nvml else None
    told: list[str] = []
    vram = case.vram_bytes - VRAM_MARGIN_BYTES if case.vram_bytes else None
    options = RuntimeOptions(case.device, vram_bytes=vram, ram_bytes=case.ram_bytes, cache=False)
    pipeline = Pipeline(open_named(case.model, {}), options, tell=told.append)
    request = pipeline.complete(GenerateOptions(PROMPT, case.size, case.size, steps=case.steps, guidance=0.0))
    startup = time.time() - started
    runs: list[dict[str, Any]] = []
    with Peak(nvml) as peak:
        outcome = _outcome(pipeline, lambda: _draw(pipeline, request, 1 + case.repeats, runs, note))
    found = {
        **outcome,
        "size": list(request.size),
        "main_format": pipeline.model.transformer.main_format,
        "synthetic": pipeline.model.synthetic,
        **pipeline.computes_with(),
        "startup_seconds": round(startup, 2),
        "runs": runs,
        "told": told,
        "context_bytes": context,
        "process_peak_bytes": peak.bytes - before if nvml and nvml.works else None,
        "peak_rss_bytes": peak_rss_bytes(),
        "plans": {name: plan.facts() for name, plan in pipeline.plans.items()},
    }
    with suppress(torch.OutOfMemoryError):  # on a card that others use
        ceilings = measure(pipeline.hardware)
        found |= {"ceilings": asdict(ceilings), "work": _work(pipeline, request, ceilings)}
    return found


def _take_context(case: Case, nvml: Nvml, before: int) -> int:
    """Make the CUDA context and set the cap. -> the context's bytes, as the driver counts, or as it is assumed."""
    torch.zeros(1, device="cuda")
    context = nvml.used() - before if nvml.works else CUDA_CONTEXT_BYTES
    if case.vram_bytes:
        total = torch.cuda.get_device_properties(0).total_memory
        room = case.vram_bytes - max(context, CUDA_CONTEXT_BYTES)
        torch.cuda.set_per_process_memory_fraction(min(room / total, 1.0), 0)
    return context


def _outcome(pipeline: Pipeline, draw: Callable[[], None]) -> dict[str, str]:
    try:
        draw()
    except BudgetError as error:  # before anything ran, there are no plans
        return {"outcome": OOM if pipeline.plans else NO_FIT, "reason": str(error)}
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return {"outcome": OOM, "reason": str(error).splitlines()[0]}
    return {"outcome": DONE}


def _draw(
    pipeline: Pipeline,
    request: GenerateOptions,
    count: int,
    runs: list[dict[str, Any]],
    note: Callable[[dict[str, Any]], None],
) -> None:
    """The same image so many times; what each took goes to `runs` and to `note` as it comes."""
    for _ in range(count):
        start = time.perf_counter()
        pipeline.generate([request])
        seconds = time.perf_counter() - start
        steps, found = list(pipeline.meter.step_seconds), pipeline.meter.phases
        runs.append({"seconds": round(seconds, 4), "step_seconds": steps, "phases": found})
        note(runs[-1])


def _work(pipeline: Pipeline, request: GenerateOptions, ceilings: Ceilings) -> dict[str, Any]:
    """Of each phase that ran where the ceilings were measured, in the way it was done."""
    tokens = len(pipeline.model.tokenizer.encode(request.prompt))
    job = Job(*request.size, steps=request.step_count, prompt_tokens=(tokens,))
    here = machine_here(pipeline.hardware, pipeline.choice.compute.int8)
    ways = [way for ways in phases(pipeline.sizes, job, here) for way in ways]
    on = "gpu" if here.gpu else "cpu"
    found = {}
    for name, plan in pipeline.plans.items():
        mine = [way for way in ways if (way.name, way.device, way.way) == (name, plan.device, plan.way)]
        if plan.device == on and mine:
            found[name] = asdict(PhaseWork.of(replace(mine[0], passes=plan.passes), ceilings))
    return found


def _print(fact: dict[str, Any]) -> None:
    print(json.dumps(fact), flush=True)


if __name__ == "__main__":
    _print(measured(Case(**json.loads(sys.argv[1])), lambda run: _print({"run": run})))
