"""A worker's process, in this one: what it says of an order, to the end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from zimage_lite import GenerateOptions
from zimage_lite.config import RuntimeOptions
from zimage_lite.pictures.recipe import asked
from zimage_lite.pictures.saving import recipe_of
from zimage_lite.workers.drawer import Drawer
from zimage_lite.workers.orders import CancelledError, DrawError, Order, Watch
from zimage_lite.workers.seat import DRAWN, END, Seat

RUNTIME = RuntimeOptions("cpu", cache=False)


def order(*seeds: int, **more: Any) -> Order:
    return Order("demo", [GenerateOptions("a red circle", steps=2, seed=seed, **more) for seed in seeds])


def heard(seat: Seat, cancelled: bool = False, watched: bool = False) -> list[tuple[str, Any]]:
    found = seat.hear(60, cancelled, watched)
    while found[-1][0] != END:
        found += seat.hear(60, cancelled, watched)
    return found


@pytest.mark.slow
def test_pictures_are_those_of_a_drawer_here() -> None:
    seat, given = Seat(RUNTIME), order(3, 4)
    seat.begin(given)
    said = heard(seat)
    pictures = [value for name, value in said if name == DRAWN]
    assert pictures == list(Drawer(RUNTIME).draw(given, Watch())) and said[-1] == (END, None)
    assert {name for name, _ in said} == {"progress", "memory", DRAWN, END}
    found = recipe_of(pictures[1].file)
    wanted = {name: value for name, value in asked(given.requests[1]).items() if value is not None}
    assert found.items() >= wanted.items() and found["model"]["name"] == "demo"


@pytest.mark.slow
def test_previews_are_made_for_those_who_look() -> None:
    seat = Seat(RUNTIME)
    seat.hear(0, False, True)
    seat.begin(replace(order(1), requests=[GenerateOptions("x", steps=50)]))
    assert "preview" in {name for name, _ in heard(seat, watched=True)}


def test_a_cancelled_order_ends_and_the_next_begins() -> None:
    seat = Seat(RUNTIME)
    seat.begin(order(*range(10)))
    assert isinstance(heard(seat, cancelled=True)[-1][1], CancelledError)
    seat.begin(order(*range(10)))  # which nobody hears
    seat.begin(order(1))
    assert [name for name, _ in heard(seat)].count(DRAWN) == 1


def test_what_cannot_be_drawn_is_told(tmp_path: Path) -> None:
    seat = Seat(RUNTIME)
    seat.begin(Order(str(tmp_path / "none"), order(1).requests))
    error = heard(seat)[-1][1]
    assert isinstance(error, DrawError) and error.code == "invalid_request" and "none" in error.message


def test_recipes_are_those_of_what_would_be_drawn(tmp_path: Path) -> None:
    seat, given = Seat(RUNTIME), order(3, 4)
    recipes, notes = seat.recipes(given)
    drawn = [recipe_of(one.file) for one in Drawer(RUNTIME).draw(given, Watch())]
    assert recipes == [{name: value for name, value in said.items() if name != "size"} for said in drawn]
    assert notes == []
    with pytest.raises(DrawError, match="none"):
        seat.recipes(Order(str(tmp_path / "none"), given.requests))


@pytest.mark.parametrize(("named", "neighbours", "divided"), [(None, 4, True), (None, 1, False), (10**9, 4, False)])
def test_neighbours_share_the_memory(named: int | None, neighbours: int, divided: bool) -> None:
    seat = Seat(replace(RUNTIME, ram_bytes=named))
    seat.settle(neighbours)
    found = seat.drawer.runtime.ram_bytes
    assert found != named if divided else found == named
    assert not divided or 0 < found <= psutil.virtual_memory().total / 4
