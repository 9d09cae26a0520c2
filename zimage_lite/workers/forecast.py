"""What an order would take, before it is drawn and while another one is: from headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

from ..adapters.library import AdapterLibrary
from ..api import open_named
from ..checkpoint.hub import is_hub_id
from ..config import RuntimeOptions
from ..errors import BudgetError, UserError
from ..pipeline.drawing import Pipeline
from .memory_facts import places
from .orders import DrawError, Order

if TYPE_CHECKING:
    from ..checkpoint.model_files import ModelFiles
    from ..memory.machine import Machine
    from ..memory.plan import Plan


class Forecast:
    """Has a pipeline of its own, and shares nothing that changes with the one that draws."""

    def __init__(self, runtime: RuntimeOptions) -> None:
        self.runtime, self._lock = runtime, Lock()
        self._pipeline: Pipeline | None = None
        self._model: tuple[object, ...] | None = None

    def of(self, order: Order, files: ModelFiles | None, machine: Machine | None) -> dict[str, Any]:
        """Plain data. fits: None where that cannot be said yet, and then, or if not, message says why; memory: of each
        place what is planned and the ceiling, in bytes; phases: each with its peaks, and seconds as predicted.

        files: of its model, if they are open; machine: before what is drawn now was begun, for what that takes will be
        free by then. Raises DrawError for what cannot be drawn at all."""
        with self._lock:
            if files is None and isinstance(order.model, str) and is_hub_id(order.model):
                return _unknown(f"{order.model} is planned once it was opened: it may have to be downloaded first")
            try:
                return self._planned(self._opened(order, files), order, machine)
            except UserError as error:
                raise DrawError.of(error) from None

    def give_back(self) -> None:
        with self._lock:
            self._pipeline = self._model = None

    def _opened(self, order: Order, files: ModelFiles | None) -> Pipeline:
        if self._pipeline is None or self._model != order.weights:
            self._pipeline = Pipeline(files or open_named(order.model, order.parts), self.runtime)
            # Without weights, for DoRA would read them.
            self._pipeline.adapters = AdapterLibrary(self._pipeline.model.transformer.config, self._pipeline.tell)
            self._model = order.weights
        return self._pipeline

    def _planned(self, pipeline: Pipeline, order: Order, machine: Machine | None) -> dict[str, Any]:
        pipeline.work.machine = machine
        gpu, (_, budgets) = pipeline.hardware.device.type == "cuda", pipeline.work.planning.now()
        try:
            plans = pipeline.planned(order.requests)
        except BudgetError as error:
            return {**_unknown(str(error)), "fits": False, "memory": places([], budgets, gpu)}
        seconds = round(sum(plan.total_ms for plan in plans) / 1000, 1)
        memory, phases = places(plans, budgets, gpu), _phases(plans)
        return {"fits": True, "message": None, "memory": memory, "phases": phases, "seconds": seconds}


def _unknown(message: str) -> dict[str, Any]:
    return {"fits": None, "message": message, "memory": [], "phases": [], "seconds": None}


def _phases(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    return [
        {
            "phase": plan.phase,
            "device": plan.device,
            "peak_vram_bytes": plan.peak_vram_bytes,
            "peak_ram_bytes": plan.peak_ram_bytes,
            "seconds": round(plan.total_ms / 1000, 1),
        }
        for plan in plans
    ]
