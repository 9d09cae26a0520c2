"""What an order would take: as the pipeline plans it, from headers, and without what is drawn meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from zimage_lite import GenerateOptions
from zimage_lite.config import RuntimeOptions
from zimage_lite.workers.drawer import Drawer
from zimage_lite.workers.orders import DrawError, Order, Watch
from zimage_lite.workers.seat import Seat

RUNTIME = RuntimeOptions("cpu", cache=False)
ORDER = Order("demo", [GenerateOptions("a red circle", steps=2)])
MANY_BYTES, SLACK_BYTES = 400_000_000, 100_000_000  # the process itself grows and shrinks


def planned(drawer: Drawer, order: Order = ORDER) -> int:
    (memory,) = drawer.plan(order)["memory"]
    return memory["planned"]


@pytest.mark.slow
def test_phases_are_those_that_are_drawn() -> None:
    drawer = Drawer(RUNTIME)
    told = drawer.plan(ORDER)["phases"]
    assert drawer.pipeline is None
    list(drawer.draw(ORDER, Watch()))
    plans = drawer.pipeline.plans
    assert [one["phase"] for one in told] == list(plans)
    for one in told:
        assert one["peak_ram_bytes"] == pytest.approx(plans[one["phase"]].peak_ram_bytes, abs=SLACK_BYTES)


def test_what_is_drawn_now_is_free_by_then() -> None:
    drawer, held, found = Drawer(RUNTIME), list[bytes](), list[int]()

    class Taking(Watch):
        def progress(self, phase: str, done: int, total: int) -> None:
            if phase == "denoise" and not held:
                held.append(b"x" * MANY_BYTES)
                found.append(planned(drawer))

    before = planned(drawer)
    list(drawer.draw(ORDER, Taking()))
    assert abs(found[0] - before) < SLACK_BYTES
    assert planned(drawer) > before + MANY_BYTES - SLACK_BYTES  # nothing is drawn, and it is held still


@pytest.mark.slow
def test_a_seat_says_the_same() -> None:
    seat = Seat(RUNTIME)
    found = seat.plan(ORDER)
    assert found["fits"] and found.keys() == Drawer(RUNTIME).plan(ORDER).keys()
    seat.give_back()
    assert seat.plan(ORDER)["fits"]


def test_nothing_is_downloaded_for_it(tmp_path: Path) -> None:
    found = Drawer(RUNTIME).plan(Order("nobody/nothing", ORDER.requests))
    assert found["fits"] is None and "nobody/nothing" in found["message"]
    with pytest.raises(DrawError, match="no such model"):
        Drawer(RUNTIME).plan(Order(str(tmp_path / "none"), ORDER.requests))
