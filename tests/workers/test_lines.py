"""Many pictures by several workers, some of which are lost: each is kept once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from threading import Event

import pytest

from zimage_lite.config import GenerateOptions
from zimage_lite.workers.lines import MOST_AT_ONCE, MOST_LOSSES, Task, draw_all
from zimage_lite.workers.orders import CancelledError, DrawError, Drawn, LostError, Order, Watch

Draw = Callable[[Order, Watch], Iterator[Drawn]]


def picture(place: int) -> Drawn:
    return Drawn(place, b"", 1, 1)


class Fake:
    """draws: what it does with one order after another, the last for all that follow. renews: whether it can be."""

    def __init__(self, *draws: Draw, renews: bool = True) -> None:
        self.draws, self.renews, self.renewed = list(draws), renews, 0

    def draw(self, order: Order, watch: Watch) -> Iterator[Drawn]:
        draw = self.draws.pop(0) if len(self.draws) > 1 else self.draws[0]
        yield from draw(order, watch)

    def renew(self) -> None:
        self.renewed += 1
        if not self.renews:
            raise LostError("no place")


def whole(order: Order, watch: Watch) -> Iterator[Drawn]:
    yield from map(picture, range(len(order.requests)))


def lost_after(count: int) -> Draw:
    def draw(order: Order, watch: Watch) -> Iterator[Drawn]:
        yield from map(picture, range(min(count, len(order.requests) - 1)))
        raise LostError("gone")

    return draw


def kept(drawers: Sequence[Fake], count: int) -> tuple[list[int], list[str]]:
    """The numbers as they came, and the notes."""
    found, notes = list[int](), list[str]()

    def order(numbers: Sequence[int]) -> Order:
        return Order("demo", [GenerateOptions(seed=number) for number in numbers])

    draw_all(drawers, range(count), Task(order, lambda number, drawn: found.append(number), notes.append))
    return found, notes


@pytest.mark.parametrize("workers", [1, 3])
def test_each_is_drawn_once(workers: int) -> None:
    found, notes = kept([Fake(whole) for _ in range(workers)], 100)
    assert sorted(found) == list(range(100)) and notes == []


def test_orders_get_smaller_so_that_all_end_together() -> None:
    sizes = list[int]()

    def draw(order: Order, watch: Watch) -> Iterator[Drawn]:
        sizes.append(len(order.requests))
        yield from whole(order, watch)

    kept([Fake(draw)], 100)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == MOST_AT_ONCE and sizes[-1] == 1


@pytest.mark.parametrize("renews", [True, False])
def test_what_a_lost_worker_had_is_drawn_by_others(renews: bool) -> None:
    lost, other = Fake(lost_after(2), whole, renews=renews), Fake(whole)
    found, notes = kept([lost, other], 50)
    assert Counter(found) == Counter(range(50))
    if lost.renewed:  # else the other one was faster
        assert "gone; others draw what it had" in notes and ("one worker less: no place" in notes) is not renews


def test_a_picture_that_ends_workers_is_found() -> None:
    def draw(order: Order, watch: Watch) -> Iterator[Drawn]:
        for place, request in enumerate(order.requests):
            if request.seed == 7:
                raise LostError("gone")
            yield picture(place)

    with pytest.raises(LostError, match=f"picture 7: {MOST_LOSSES} workers ended while they drew it"):
        kept([Fake(draw), Fake(draw)], 20)


def test_no_worker_is_left() -> None:
    with pytest.raises(LostError, match="no worker is left, and 10 pictures are not drawn"):
        kept([Fake(lost_after(0), renews=False)], 10)


def test_a_fault_stops_all() -> None:
    began = Event()

    def failing(order: Order, watch: Watch) -> Iterator[Drawn]:
        began.wait(30)
        raise DrawError("invalid_request", "no such model")
        yield

    def waiting(order: Order, watch: Watch) -> Iterator[Drawn]:
        began.set()
        while not watch.cancelled:
            pass
        raise CancelledError
        yield

    with pytest.raises(DrawError, match="no such model"):
        kept([Fake(failing), Fake(waiting)], 10)


def test_nothing_is_kept_once_keeping_failed() -> None:
    def full(number: int, drawn: Drawn) -> None:
        found.append(number)
        raise OSError("full")

    found = list[int]()
    order = Order("demo", [GenerateOptions()] * 5)
    with pytest.raises(OSError, match="full"):
        draw_all([Fake(whole)], range(5), Task(lambda numbers: order, full, print))
    assert found == [0]


def test_nothing_to_draw() -> None:
    assert kept([Fake(whole)], 0) == ([], [])
