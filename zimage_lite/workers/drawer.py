"""A worker as such, in whatever process it lives: opens the model that an order names, keeps it for the next one, and
outlives whatever an order raises."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any, cast

from ..api import open_named
from ..checkpoint.hashes import FileHash
from ..config import RuntimeOptions
from ..errors import UserError
from ..memory.failures import forget, is_out_of_memory
from ..pictures.saving import write
from ..pipeline.drawing import Pipeline
from ..pipeline.previews import previewer
from .forecast import Forecast
from .memory_facts import memory_facts
from .orders import CancelledError, DrawError, Drawn, Order, Watch

if TYPE_CHECKING:
    from torch import Tensor

    from ..memory.machine import Machine
    from ..pipeline.denoise import Step

Opener = Callable[[Order, RuntimeOptions, Callable[[str], None]], Pipeline]


def opened(order: Order, runtime: RuntimeOptions, tell: Callable[[str], None]) -> Pipeline:
    return Pipeline(open_named(order.model, order.parts), runtime, tell)


class Drawer:
    """opener: makes the pipeline of an order."""

    def __init__(self, runtime: RuntimeOptions, opener: Opener = opened) -> None:
        self.runtime, self.opener = runtime, opener
        self.pipeline: Pipeline | None = None
        self._model: tuple[object, ...] | None = None
        self._hash: FileHash | None = None
        self._watch = Watch()
        self._forecast, self._before = Forecast(runtime), cast("Machine | None", None)  # before what is drawn now

    def draw(self, order: Order, watch: Watch) -> Iterator[Drawn]:
        """The pictures as they come. Raises DrawError, CancelledError; closed before its end, it stops there."""
        with self._answering(watch):
            yield from self._pictures(order, watch)

    def recipes(self, order: Order, watch: Watch) -> list[dict[str, Any]]:
        """What each picture would say of itself but for its size, without drawing it. Raises DrawError."""
        with self._answering(watch):
            pipeline = self._opened(order)
            sha256 = self._sha256()
            return [pipeline.recipe(pipeline.complete(request), sha256=sha256) for request in order.requests]

    @contextmanager
    def _answering(self, watch: Watch) -> Iterator[None]:
        self._watch = watch
        try:
            yield
        except CancelledError as error:
            forget(error)
            raise
        except UserError as error:
            raise DrawError.of(error) from None
        except Exception as error:  # noqa: BLE001 - whatever it was, the next one is drawn
            failure = _failure(error)
            forget(error)
            self.give_back()
            raise failure from None
        finally:
            self._watch, self._before = Watch(), None

    def plan(self, order: Order) -> dict[str, Any]:
        """As `Forecast.of`; whatever is drawn meanwhile, in another thread, goes on. Raises DrawError."""
        pipeline = self.pipeline
        files = pipeline.model if pipeline and self._model == order.weights else None
        return self._forecast.of(order, files, self._before)

    def give_back(self) -> None:
        """What is open is closed; the next order opens it again."""
        self._forecast.give_back()
        if self.pipeline is not None:
            self.pipeline = self._model = self._hash = None
            gc.collect()

    def renew(self) -> None:
        """After it was lost, which this one cannot be."""

    def _pictures(self, order: Order, watch: Watch) -> Iterator[Drawn]:
        pipeline = self._opened(order)
        (self._before, budgets), preview = pipeline.work.planning.now(), previewer(pipeline.model)

        def on_step(step: Step) -> None:
            _check(watch)
            watch.memory(memory_facts(pipeline, budgets))
            if watch.watched:
                watch.preview(_jpeg(preview(step.x0)))

        def progress(phase: str, done: int, total: int) -> None:
            _check(watch)
            watch.progress(phase, done, total)

        drawn = pipeline.images(order.requests, progress, on_step)
        with closing(cast("Generator[tuple[int, Tensor], None, None]", drawn)) as images:
            for place, pixels in images:
                watch.memory(memory_facts(pipeline, budgets))
                yield self._file(order, place, pixels, pipeline)
                _check(watch)

    def _file(self, order: Order, place: int, pixels: Tensor, pipeline: Pipeline) -> Drawn:
        request, (height, width) = pipeline.complete(order.requests[place]), pixels.shape[:2]
        said = pipeline.recipe(request, pixels, self._sha256())
        said |= order.told[place] if order.told else {}
        file = BytesIO()
        write(file, order.suffix, pixels, said)
        return Drawn(place, file.getvalue(), width, height)

    def _opened(self, order: Order) -> Pipeline:
        if self.pipeline is None or self._model != order.weights:
            self.give_back()
            self.pipeline, self._model = self.opener(order, self.runtime, self._tell), order.weights
            self._hash = FileHash(list(self.pipeline.model.transformer.stamps), keep=self.runtime.cache).start()
        return self.pipeline

    def _sha256(self) -> str | None:
        return self._hash.result(self._tell) if self._hash else None

    def _tell(self, line: str) -> None:
        self._watch.note(line)


def _check(watch: Watch) -> None:
    if watch.cancelled:
        raise CancelledError


def _failure(error: Exception) -> DrawError:
    if is_out_of_memory(error):
        return DrawError("out_of_memory", "memory ran out; close other programs, or draw something smaller")
    return DrawError("internal", type(error).__name__, "".join(traceback.format_exception(error)))


def _jpeg(pixels: Tensor) -> bytes:
    from PIL import Image

    file = BytesIO()
    Image.fromarray(pixels.numpy()).save(file, format="JPEG", quality=85)
    return file.getvalue()
