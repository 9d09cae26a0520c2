"""Workers in processes of their own, one on each GPU, of this machine or of a Ray cluster: Ray starts them, finds them
their GPUs, carries what they are told, and knows when one is gone."""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from ..config import RuntimeOptions
from ..errors import UserError
from .orders import DrawError, Drawn, LostError, Order, Watch
from .places import Workers
from .seat import DRAWN, END, Seat

_HEAR_S = 0.25  # and so long a worker may not know that an order was cancelled
_START_S = 120.0  # Python, torch, and a place on the cluster
_PLAN_S = 30.0  # of a model that is to be opened, with LoRAs; a client waits for it
_STORE_BYTES = 100_000_000  # of what Ray shares between processes: pictures on their way


class RayDrawer:
    """As a Drawer, but elsewhere. start: makes another actor."""

    def __init__(self, ray: ModuleType, start: Callable[[], Any]) -> None:
        self._ray, self._start, self._actor, self.neighbours = ray, start, start(), 1

    def draw(self, order: Order, watch: Watch) -> Iterator[Drawn]:
        """As `Drawer.draw`. Raises also LostError; then `renew` may help."""
        try:
            self.ask("begin", order.carried())
        except UserError as error:
            raise DrawError("invalid_request", str(error)) from None
        while True:
            for name, values in self.ask("hear", _HEAR_S, watch.cancelled, watch.watched):
                if name == DRAWN:
                    yield values
                elif name != END:
                    getattr(watch, name)(*values)
                elif values is not None:
                    raise values
                else:
                    return

    def recipes(self, order: Order, watch: Watch) -> list[dict[str, Any]]:
        """As `Drawer.recipes`. Raises also LostError."""
        found, notes = self.ask("recipes", order)
        for line in notes:
            watch.note(line)
        return found

    def plan(self, order: Order) -> dict[str, Any]:
        """As `Drawer.plan`. Raises also LostError, and UserError for a picture that cannot be read here."""
        return self.ask("plan", order.carried(), timeout=_PLAN_S)

    def ask(self, method: str, *values: Any, timeout: float | None = None) -> Any:
        """What its method gives. Raises LostError, and DrawError as the method does."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(getattr(self._actor, method).remote(*values), timeout=timeout)
        except errors.RayTaskError as error:
            if isinstance(error.cause, DrawError):
                raise error.cause from None
            raise  # our own fault, not the worker's end
        except (errors.RayError, ConnectionError) as error:
            raise LostError(f"a worker was lost ({type(error).__name__})") from error

    def renew(self) -> None:
        """A new one in the place of one that was lost. Raises LostError if there is no place for it."""
        self.end()
        self._actor = self._start()
        self.ask("settle", self.neighbours, timeout=_START_S)

    def give_back(self) -> None:
        with suppress(LostError):
            self.ask("give_back")

    def end(self) -> None:
        with suppress(Exception):  # it is gone already
            self._ray.kill(self._actor)


@contextmanager
def hired(workers: Workers, runtime: RuntimeOptions) -> Iterator[list[RayDrawer]]:
    """All of them, ready to draw. Raises UserError."""
    ray = _connected(workers, runtime)
    drawers = list[RayDrawer]()
    try:
        count, resources = _shares(workers, runtime, ray.cluster_resources())
        actor = ray.remote(**resources)(Seat)
        drawers += [RayDrawer(ray, lambda: actor.remote(runtime)) for _ in range(count)]
        _settle(drawers)
        yield drawers
    finally:
        for drawer in drawers:
            drawer.end()
        ray.shutdown()


def _connected(workers: Workers, runtime: RuntimeOptions) -> ModuleType:
    if find_spec("ray") is None:
        raise UserError("--workers needs ray", fix='pip install "zimage-lite[ray]"')
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers of each run
    own: dict[str, Any] = {"address": workers.address}
    if workers.address is None:
        # Its ports are open to the network, and who reaches them runs code. Read when ray is imported.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        cores = max(os.cpu_count() or 1, workers.count or 1)
        own = {"address": "local", "num_cpus": cores, "include_dashboard": False, "object_store_memory": _STORE_BYTES}
    import ray

    try:
        ray.init(**own, log_to_driver=False, logging_level="critical")
    except (ConnectionError, RuntimeError, ValueError, ImportError) as error:
        said = str(error).strip().split("\n")[0]
        where = workers.address or "this machine"
        raise UserError(f"--workers: no Ray at {where} ({said[:200]})", fix="see `ray status` there") from error
    return ray


def _shares(workers: Workers, runtime: RuntimeOptions, there: dict[str, float]) -> tuple[int, dict[str, float]]:
    """How many workers, and what of the cluster each takes. Raises UserError."""
    gpus = 0 if runtime.device == "cpu" else int(there.get("GPU", 0))
    cpus = int(there.get("CPU", 1))
    if workers.count is None and not gpus:
        raise UserError(
            "--workers: Ray knows of no GPU", fix="say how many are to draw on the CPU, such as --workers 2"
        )
    count = workers.count or gpus
    if gpus and count > gpus:
        fix = "each draws on a GPU of its own; --device cpu draws without"
        raise UserError("--workers", got=count, expected=f"at most {gpus}, the GPUs that are there", fix=fix)
    if count > cpus:
        raise UserError("--workers", got=count, expected=f"at most {cpus}, the processors that are there")
    return count, {"num_gpus": int(bool(gpus)), "num_cpus": max(cpus // count, 1) if not gpus else 1}


def _settle(drawers: Sequence[RayDrawer]) -> None:
    """Tells each how many share its machine."""
    try:
        machines = [drawer.ask("machine", timeout=_START_S) for drawer in drawers]
        shared = Counter(machines)
        for drawer, machine in zip(drawers, machines, strict=True):
            drawer.neighbours = shared[machine]
            drawer.ask("settle", drawer.neighbours)
    except LostError as error:
        fix = "name fewer, or see `ray status` for who else is there"
        raise UserError(f"--workers: not all {len(drawers)} could be started ({error})", fix=fix) from error
