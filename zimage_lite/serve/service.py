"""All of a server but HTTP: takes requests, draws them one after another, and keeps what came of them."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Sequence
from functools import partial
from typing import Any

from ..config import GenerateOptions, RuntimeOptions
from ..errors import UserError
from ..pictures.recipe import asked
from ..workers.orders import DrawError, Drawn, LostError, Order
from .board import Board
from .catalog import Catalog
from .fields import FieldError
from .folder_lock import locked
from .history import History, StorageError
from .jobs import LOST, Failure, Job
from .kept import told
from .options import ServeOptions
from .worker import Drawer, Worker

_STOPPING_S = 30.0  # at most, for the step that runs
_log = logging.getLogger(__name__)


class Service:
    """drawers: who draws, each by itself; by default one, in this process. lost: jobs that the last server did not
    finish. Raises UserError for a folder that cannot be used, or that another server uses."""

    def __init__(self, options: ServeOptions, drawers: Sequence[Drawer] = ()) -> None:
        self._lock = locked(options.folder)  # before what another one is at would be taken for lost
        self.options, self.history = options, History(options.folder)
        self.catalog = Catalog(options, self.history.kept.path)
        self.lost = self.history.lost()
        self.board = Board(options.limits.waiting, self._record)
        idle_s = options.idle_minutes * 60
        drawers = drawers or [_here(options.runtime)]
        tools = self._order, self._keep, idle_s, self.catalog.shown
        self.workers = [Worker(self.board, drawer, *tools) for drawer in drawers]

    def start(self) -> None:
        for worker in self.workers:
            worker.start()

    def stop(self) -> None:
        """Those that wait are lost, the one that runs stops within a step."""
        for job in self.board.close():
            self.board.finish(job, LOST, Failure("lost", "the server stopped before this was drawn"))
        for worker in self.workers:
            if worker.is_alive():
                worker.join(_STOPPING_S)
        self.history.close()
        if not any(worker.is_alive() for worker in self.workers):  # else with the process: it still writes there
            self._lock.close()

    def submit(self, model: str, requests: Sequence[GenerateOptions], client: str = "api", leaves: bool = False) -> Job:
        """leaves: nobody wants it once its client is gone. Raises UserError, QueueFullError if there is no place."""
        self.catalog.place_of(model)
        names = {str(path): name for name, path in self.catalog.loras().items()}
        named = [{"name": names.get(lora.path), "strength": lora.strength} for lora in requests[0].loras]
        first = requests[0]
        settings = {"model": model, "count": len(requests), **asked(first), **told(first), "loras": named}
        if first.controls:
            nets = {path: name for name, path in self.catalog.controls.items()}
            settings["controls"] = [{"name": nets.get(net.path), "scale": net.scale} for net in first.controls]
        job = Job(model, requests, client, leaves)
        try:
            self._keep_pictures(job)
            return self.board.submit(job, partial(self.history.put, settings=settings))
        except UserError:
            self.history.kept.release(job.id)
            raise

    def plan(self, model: str, requests: Sequence[GenerateOptions]) -> dict[str, Any]:
        """What they would take, by the first worker that is there; see `Forecast.of`. Raises UserError, LostError if
        there is none."""
        order = Order(self.catalog.place_of(model), requests)
        plans = (_plan(worker.drawer, order) for worker in self.workers if worker.is_alive())
        try:
            found = next(filter(None, plans), None)
        except DrawError as error:
            raise FieldError.of(self.catalog.shown(error.message)) from None
        if found is None:
            raise LostError("no worker is there")
        return found

    def _keep_pictures(self, job: Job) -> None:
        """So that it does not hold them while it waits."""
        try:
            job.requests = self.history.kept.of(job.id, job.requests)
        except (UserError, OSError, sqlite3.Error) as error:
            raise StorageError(f"the pictures cannot be kept: {error}") from error

    def facts(self, job_id: str) -> dict[str, Any] | None:
        """Of a job: how it is, and what was asked for, which the history knows."""
        known, job = self.history.job(job_id), self.board.get(job_id)
        return {**(known or {}), **self.board.facts(job)} if job else known

    def delete(self, job_id: str) -> bool:
        """From the history, stopped first if it is not over. False if there is none."""
        job = self.board.get(job_id)
        if job and self.board.cancel(job):
            self.board.wait(job, _STOPPING_S)
        if job:
            self.board.forget(job)
        return self.history.delete(job_id)

    def _order(self, job: Job, places: list[int]) -> Order:
        requests = [job.requests[place] for place in places]
        return Order(self.catalog.place_of(job.model), requests, told=[told(requests[0])] * len(requests))

    def _keep(self, job: Job, place: int, drawn: Drawn) -> None:
        picture = self.history.add(job, place, (drawn.width, drawn.height), drawn.file)
        self.board.change(job, pictures=sorted([*job.pictures, picture], key=lambda one: one.seed))

    def _record(self, job: Job) -> None:
        try:
            self.history.put(job)
        except StorageError as error:  # it is drawn all the same, and what cannot be kept is known
            _log.error("%s", error)


def _plan(drawer: Drawer, order: Order) -> dict[str, Any] | None:
    """None if it was lost, which is seen to by whoever has it draw."""
    try:
        return drawer.plan(order)
    except LostError:
        return None


def _here(runtime: RuntimeOptions) -> Drawer:
    from ..workers.drawer import Drawer  # torch, which a server whose workers are elsewhere does not need

    return Drawer(runtime)
