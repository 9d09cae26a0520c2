"""Real workers: processes that Ray starts on this machine, one of them killed in the middle."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch

from zimage_lite import GenerateOptions
from zimage_lite.config import RuntimeOptions
from zimage_lite.errors import UserError
from zimage_lite.workers.cluster import RayDrawer, _shares, hired
from zimage_lite.workers.drawer import Drawer
from zimage_lite.workers.lines import Task, draw_all
from zimage_lite.workers.orders import CancelledError, DrawError, Drawn, Order, Watch
from zimage_lite.workers.places import Workers

RUNTIME = RuntimeOptions("cpu", cache=False)


@pytest.fixture(scope="module")
def drawers() -> Iterator[list[RayDrawer]]:
    if find_spec("ray") is None:  # not imported: it looks for what keeps strangers out when it is
        pytest.skip("no ray (pip install 'zimage-lite[ray]')")
    root, before = Path(__file__).parents[2], dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "kernels"), before.get("PYTHONPATH", "")])
    try:
        with hired(Workers(None, 2), RUNTIME) as found:
            yield found
    finally:
        os.environ.clear()
        os.environ.update(before)


def order(numbers: list[int]) -> Order:
    return Order("demo", [GenerateOptions("a red circle", steps=2, seed=number) for number in numbers])


def kill_one() -> None:
    children = psutil.Process().children(recursive=True)
    next(child for child in children if any("Seat" in word for word in child.cmdline())).kill()


@pytest.mark.slow
def test_what_a_killed_worker_had_is_drawn_by_others(drawers: list[RayDrawer]) -> None:
    """By kill -9, when a quarter is there. The pictures are one process's, to the byte: one of as many threads, for
    sums of float32 may depend on that."""
    found, notes, numbers = list[tuple[int, bytes]](), list[str](), list(range(12))

    def keep(number: int, drawn: Drawn) -> None:
        found.append((number, drawn.file))
        if len(found) == 3:
            kill_one()

    draw_all(drawers, numbers, Task(lambda some: order(list(some)), keep, notes.append))
    assert Counter(number for number, _ in found) == Counter(numbers) and any("was lost" in note for note in notes)
    before = torch.get_num_threads()
    torch.set_num_threads(max((os.cpu_count() or 1) // 2, 1))
    try:
        wanted = [drawn.file for drawn in Drawer(RUNTIME).draw(order(numbers), Watch())]
    finally:
        torch.set_num_threads(before)
    assert dict(found) == dict(enumerate(wanted))


@pytest.mark.slow
def test_what_goes_wrong_there_is_told_here(drawers: list[RayDrawer]) -> None:
    class Gone(Watch):
        cancelled = True

    with pytest.raises(CancelledError):
        list(drawers[0].draw(order(list(range(50))), Gone()))
    with pytest.raises(DrawError) as raised:
        list(drawers[0].draw(Order("nowhere", order([1]).requests), Watch()))
    assert raised.value.code == "invalid_request" and "nowhere" in raised.value.message
    with pytest.raises(DrawError, match="nowhere"):
        drawers[0].recipes(Order("nowhere", order([1]).requests), Watch())


@pytest.mark.slow
def test_it_plans_while_it_draws(drawers: list[RayDrawer]) -> None:
    before, during = drawers[0].plan(order([1])), list[dict[str, object]]()
    for _ in drawers[0].draw(order(list(range(3))), Watch()):
        during.append(drawers[0].plan(order([1])))
    assert [found["fits"] for found in (before, *during)] == [True] * 4
    with pytest.raises(DrawError, match="nowhere"):
        drawers[0].plan(Order("nowhere", order([1]).requests))


@pytest.mark.slow
def test_a_recipe_there_is_the_one_here(drawers: list[RayDrawer]) -> None:
    wanted = Drawer(RUNTIME).recipes(order([1, 2]), Watch())
    assert [drawer.recipes(order([1, 2]), Watch()) for drawer in drawers] == [wanted] * 2


@pytest.mark.parametrize(
    ("text", "device", "there", "wanted"),
    [
        ("gpus", "auto", {"GPU": 4.0, "CPU": 16.0}, (4, {"num_gpus": 1, "num_cpus": 1})),
        ("2", "auto", {"GPU": 4.0, "CPU": 16.0}, (2, {"num_gpus": 1, "num_cpus": 1})),
        ("2", "cpu", {"GPU": 4.0, "CPU": 16.0}, (2, {"num_gpus": 0, "num_cpus": 8})),
        ("3", "auto", {"CPU": 8.0}, (3, {"num_gpus": 0, "num_cpus": 2})),
        ("gpus", "auto", {"CPU": 8.0}, "Ray knows of no GPU"),
        ("5", "auto", {"GPU": 4.0, "CPU": 16.0}, "got 5, expected at most 4"),
        ("ray://lab/9", "cpu", {"CPU": 8.0}, "got 9, expected at most 8"),
    ],
)
def test_one_on_each_gpu(text: str, device: str, there: dict[str, float], wanted: object) -> None:
    workers, runtime = Workers.of(text), RuntimeOptions(device)
    if isinstance(wanted, str):
        with pytest.raises(UserError, match=wanted):
            _shares(workers, runtime, there)
    else:
        assert _shares(workers, runtime, there) == wanted


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zimage_lite.workers.cluster.find_spec", lambda name: None)
    with (
        pytest.raises(UserError, match=r"--workers needs ray; pip install .zimage-lite\[ray\]"),
        hired(Workers(), RUNTIME),
    ):
        pass
