"""The one thread that draws. It owns the pipeline: opens it for the first job that wants its model, gives it back when
nobody has come for a while, and outlives whatever a job raises."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Generator
from contextlib import closing
from io import BytesIO
from threading import Thread
from typing import TYPE_CHECKING, cast

from ..errors import BudgetError, UserError
from ..memory.failures import forget, is_out_of_memory
from .board import Board
from .history import StorageError
from .jobs import CANCELLED, DONE, FAILED, Failure, Job
from .memory_facts import memory_facts

if TYPE_CHECKING:
    from torch import Tensor

    from ..memory.plan import Budgets
    from ..pipeline.denoise import Step
    from ..pipeline.drawing import Pipeline
    from ..pipeline.previews import Previewer

Tell = Callable[[str], None]
Opener = Callable[[str, Tell], "Pipeline"]  # of a model, by its name
Keep = Callable[[Job, int, "Tensor", "Pipeline"], None]  # a picture, and its place among those asked for
_log = logging.getLogger(__name__)


class CancelledError(Exception):
    """Raised in the middle of a run, which gives all memory back."""


class Worker(Thread):
    def __init__(self, board: Board, opener: Opener, keep: Keep, idle_s: float) -> None:
        super().__init__(name="drawing", daemon=True)
        self.board, self.opener, self.keep, self.idle_s = board, opener, keep, idle_s
        self.pipeline: Pipeline | None = None
        self._model: str | None = None
        self._previewer: Previewer | None = None
        self._job: Job | None = None
        self._budgets: Budgets | None = None  # of the job that runs

    def run(self) -> None:
        while not self.board.closed:
            if job := self.board.next(self.idle_s):
                self._draw(job)
            else:
                self._give_back()

    def _draw(self, job: Job) -> None:
        self._job = job
        try:
            self._images(job)
        except CancelledError as error:
            forget(error)
            self.board.finish(job, CANCELLED)
        except UserError as error:
            self.board.finish(job, FAILED, Failure(_code(error), str(error)))
        except Exception as error:  # noqa: BLE001 - whatever it was, the next one is drawn
            if is_out_of_memory(error):
                failure = Failure("out_of_memory", "memory ran out; close other programs, or draw something smaller")
            else:
                _log.error("job %s failed", job.id, exc_info=error)
                failure = Failure("internal", f"{type(error).__name__}: the server's log has more")
            forget(error)
            self._give_back()
            self.board.finish(job, FAILED, failure)
        else:
            self.board.finish(job, DONE)
        self._job = None

    def _images(self, job: Job) -> None:
        watch = _Watch(self.board, job)
        pipeline = self._opened(job.model)
        self._budgets = pipeline.work.planning.budgets()
        drawn = pipeline.images(job.requests, watch.progress, self._on_step)
        with closing(cast("Generator[tuple[int, Tensor], None, None]", drawn)) as images:
            for index, pixels in images:
                self.board.change(job, memory=memory_facts(pipeline, self._budgets))
                self.keep(job, index, pixels, pipeline)
                watch.check()

    def _on_step(self, step: Step) -> None:
        assert self._job and self._previewer and self.pipeline and self._budgets
        if self._job.cancelled.is_set():
            raise CancelledError
        picture = _jpeg(self._previewer(step.x0))
        memory = memory_facts(self.pipeline, self._budgets)
        self.board.change(self._job, preview=picture, previews=self._job.previews + 1, memory=memory)

    def _opened(self, model: str) -> Pipeline:
        from ..pipeline.previews import previewer

        if self.pipeline is None or self._model != model:
            self._give_back()
            self.pipeline, self._model = self.opener(model, self._tell), model
            self._previewer = previewer(self.pipeline.model)
        return self.pipeline

    def _tell(self, line: str) -> None:
        if self._job:
            self.board.change(self._job, notes=[*self._job.notes, line])

    def _give_back(self) -> None:
        if self.pipeline is not None:
            self.pipeline = self._model = self._previewer = None
            gc.collect()


def _code(error: UserError) -> str:
    if isinstance(error, StorageError):
        return "storage"
    return "too_large" if isinstance(error, BudgetError) else "invalid_request"


class _Watch:
    """How far a job is, and how long it may still take: by the steps so far."""

    def __init__(self, board: Board, job: Job) -> None:
        self.board, self.job = board, job
        self.first: tuple[float, int] | None = None

    def progress(self, phase: str, done: int, total: int) -> None:
        self.check()
        left = None
        if phase == "denoise":
            now = time.monotonic()
            if self.first is None:
                self.first = now, done
            start, steps = self.first
            left = (now - start) / (done - steps) * (total - done) if done > steps else None
        self.board.change(self.job, phase=phase, done=done, total=total, seconds_left=left)

    def check(self) -> None:
        if self.job.cancelled.is_set():
            raise CancelledError


def _jpeg(pixels: Tensor) -> bytes:
    from PIL import Image

    file = BytesIO()
    Image.fromarray(pixels.numpy()).save(file, format="JPEG", quality=85)
    return file.getvalue()
