"""All of a server but HTTP: takes requests, draws them one after another, and keeps what came of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..config import GenerateOptions
from ..pictures.recipe import asked, recipe
from ..pictures.saving import save
from .board import Board
from .catalog import Catalog
from .history import History, StorageError
from .jobs import LOST, Failure, Job
from .options import ServeOptions
from .worker import Tell, Worker

if TYPE_CHECKING:
    from torch import Tensor

    from ..checkpoint.hashes import FileHash
    from ..pipeline.drawing import Pipeline

_STOPPING_S = 30.0  # at most, for the step that runs
_log = logging.getLogger(__name__)


class Service:
    """lost: jobs that the last server did not finish. Raises UserError for a folder that cannot be used."""

    def __init__(self, options: ServeOptions) -> None:
        self.options, self.catalog, self.history = options, Catalog(options), History(options.folder)
        self.lost = self.history.lost()
        self.board = Board(options.limits.waiting, self._record)
        self.worker = Worker(self.board, self._open, self._keep, options.idle_minutes * 60)
        self._hashes: dict[str, FileHash] = {}

    def start(self) -> None:
        self.worker.start()

    def stop(self) -> None:
        """Those that wait are lost, the one that runs stops within a step."""
        for job in self.board.close():
            self.board.finish(job, LOST, Failure("lost", "the server stopped before this was drawn"))
        if self.worker.is_alive():
            self.worker.join(_STOPPING_S)
        self.history.close()

    def submit(self, model: str, requests: Sequence[GenerateOptions], client: str = "api", leaves: bool = False) -> Job:
        """leaves: nobody wants it once its client is gone. Raises UserError, QueueFullError if there is no place."""
        self.catalog.place_of(model)
        names = {str(path): name for name, path in self.catalog.loras().items()}
        named = [{"name": names.get(lora.path), "strength": lora.strength} for lora in requests[0].loras]
        settings = {"model": model, "count": len(requests), **asked(requests[0]), "loras": named}
        if requests[0].controls:
            nets = {path: name for name, path in self.catalog.controls.items()}
            settings["controls"] = [{"name": nets.get(net.path), "scale": net.scale} for net in requests[0].controls]
        return self.board.submit(Job(model, requests, client, leaves), partial(self.history.put, settings=settings))

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

    def _open(self, model: str, tell: Tell) -> Pipeline:
        from ..api import open_named
        from ..checkpoint.hashes import FileHash
        from ..pipeline.drawing import Pipeline

        runtime = self.options.runtime
        pipeline = Pipeline(open_named(self.catalog.place_of(model), {}), runtime, tell)
        self._hashes[model] = FileHash(list(pipeline.model.transformer.stamps), keep=runtime.cache).start()
        return pipeline

    def _keep(self, job: Job, number: int, pixels: Tensor, pipeline: Pipeline) -> None:
        request, size = pipeline.complete(job.requests[number]), (pixels.shape[1], pixels.shape[0])
        beside = pipeline.adapters.told(request.loras), pipeline.controls.told(request)
        said = recipe(request, pipeline.model, size, *beside, self._hashes[job.model].result())
        picture = self.history.add(job, number, size, lambda path: save(path, pixels, said))
        self.board.change(job, pictures=sorted([*job.pictures, picture], key=lambda one: one.seed))

    def _record(self, job: Job) -> None:
        try:
            self.history.put(job)
        except StorageError as error:  # it is drawn all the same, and what cannot be kept is known
            _log.error("%s", error)
