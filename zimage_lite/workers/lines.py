"""Thousands of pictures by several workers: each is drawn once, and what a lost worker had not handed over, by others.
Loads no torch."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from threading import Condition, Lock, Thread
from typing import Any, Protocol

from .orders import CancelledError, Drawn, LostError, Order, Watch

MOST_AT_ONCE = 16  # pictures of an order: they share a load of the model, and are lost together
MOST_LOSSES = 3  # workers, before a picture is held to be what ends them
_PATIENCE_S = 5.0  # with a worker that has handed over all, or waits for a place that it no longer needs
_LOOK_S = 0.5  # on Windows, what waits without end cannot be interrupted


class Drawer(Protocol):
    """`drawer.Drawer`, or `cluster.RayDrawer`."""

    def draw(self, order: Order, watch: Watch) -> Iterator[Drawn]: ...
    def recipes(self, order: Order, watch: Watch) -> list[dict[str, Any]]: ...
    def renew(self) -> None: ...


@dataclass(frozen=True)
class Task:
    """order: of pictures, by their numbers; keep: called with each, never by two threads at a time, and not after
    `draw_all` has returned; note: takes lines for people, each once."""

    order: Callable[[Sequence[int]], Order]
    keep: Callable[[int, Drawn], None]
    note: Callable[[str], None]


def draw_all(drawers: Sequence[Drawer], numbers: Iterable[int], task: Task) -> None:
    """Raises what a worker or `keep` raised first, and LostError if no worker is left."""
    todo = _Todo(numbers, len(drawers))
    hands = [Thread(target=_work, args=(drawer, todo, task), daemon=True) for drawer in drawers]
    for hand in hands:
        hand.start()
    try:
        while not todo.wait(_LOOK_S) and any(hand.is_alive() for hand in hands):
            pass
        for hand in hands:
            hand.join(_PATIENCE_S)
    finally:
        todo.stop()
    if todo.error:
        raise todo.error
    if todo.left or todo.held:
        raise LostError(f"no worker is left, and {len(todo.left)} pictures are not drawn")


class _Todo:
    """What is left, and how much is in somebody's hands."""

    def __init__(self, numbers: Iterable[int], workers: int) -> None:
        self.left, self.workers, self.held = deque(numbers), workers, 0
        self.losses, self.noted = Counter[int](), set[str]()
        self.error: Exception | None = None
        self.stopped = False
        self.lock, self.keeping = Condition(), Lock()

    def take(self) -> list[int]:
        """The next ones, fewer towards the end so that all workers end together, and alone what was lost before; none
        if all is over."""
        with self.lock:
            self.lock.wait_for(lambda: self.left or not self.held or self.stopped)
            if self.stopped or not self.left:
                return []
            count = 1 if self.losses[self.left[0]] else min(-(-len(self.left) // (2 * self.workers)), MOST_AT_ONCE)
            self.held += count
            return [self.left.popleft() for _ in range(count)]

    def hand_over(self, keep: Callable[[], None]) -> None:
        """One of those that were taken."""
        with self.keeping:
            if self.stopped:
                raise CancelledError
            keep()
        with self.lock:
            self.held -= 1
            self.lock.notify_all()

    def put_back(self, numbers: Sequence[int]) -> None:
        """What a lost worker held: others draw it. Raises LostError for what has ended too many."""
        with self.lock:
            self.held -= len(numbers)
            self.left.extendleft(reversed(numbers))
            self.losses.update(numbers)
            self.lock.notify_all()
        if numbers and (losses := self.losses[numbers[0]]) >= MOST_LOSSES:
            raise LostError(f"picture {numbers[0]}: {losses} workers ended while they drew it")

    def wait(self, seconds: float) -> bool:
        """Whether all is over by then."""
        with self.lock:
            return self.lock.wait_for(lambda: self.stopped or not (self.left or self.held), seconds)

    def stop(self, error: Exception | None = None) -> None:
        with self.keeping, self.lock:
            self.error, self.stopped = self.error or error, True
            self.lock.notify_all()


class _OfAll(Watch):
    def __init__(self, todo: _Todo, task: Task) -> None:
        self.todo, self.task = todo, task

    @property
    def cancelled(self) -> bool:  # type: ignore[override]
        return self.todo.stopped

    def note(self, line: str) -> None:
        with self.todo.lock:
            if line not in self.todo.noted:
                self.todo.noted.add(line)
                self.task.note(line)


def _work(drawer: Drawer, todo: _Todo, task: Task) -> None:
    watch = _OfAll(todo, task)
    try:
        while (numbers := todo.take()) and (_drawn(drawer, todo, task, numbers, watch) or _renewed(drawer, watch)):
            pass
    except CancelledError:
        return
    except Exception as error:  # noqa: BLE001 - told where it is waited for
        todo.stop(error)


def _drawn(drawer: Drawer, todo: _Todo, task: Task, numbers: Sequence[int], watch: Watch) -> bool:
    """False if the worker was lost, and what it held is put back."""
    missing = list(numbers)
    try:
        with closing(drawer.draw(task.order(numbers), watch)) as images:  # type: ignore[type-var]
            for drawn in images:
                number = numbers[drawn.place]
                todo.hand_over(partial(task.keep, number, drawn))
                missing.remove(number)
    except LostError as error:
        watch.note(f"{error}; others draw what it had")
        todo.put_back(missing)
        return False
    return True


def _renewed(drawer: Drawer, watch: Watch) -> bool:
    try:
        drawer.renew()
    except LostError as error:
        watch.note(f"one worker less: {error}")
        return False
    return True
