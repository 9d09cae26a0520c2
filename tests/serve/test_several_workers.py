"""One queue, several who draw: at once, and for one that is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Barrier

import pytest
from served import png

from zimage_lite.config import GenerateOptions
from zimage_lite.serve.jobs import DONE, FAILED, Job
from zimage_lite.serve.options import ServeOptions
from zimage_lite.serve.service import Service
from zimage_lite.serve.worker import MOST_LOSSES
from zimage_lite.workers.orders import Drawn, LostError, Order, Watch

Options = Callable[..., ServeOptions]
MINUTE_S = 60


class Fake:
    """before: called before each picture."""

    def __init__(self, before: Callable[[int], object], renews: bool = True) -> None:
        self.before, self.renews = before, renews
        self.orders: list[list[int]] = []

    def draw(self, order: Order, watch: Watch) -> Iterator[Drawn]:
        self.orders.append([request.seed for request in order.requests])
        for place, request in enumerate(order.requests):
            self.before(request.seed)
            yield Drawn(place, png(), 64, 64)

    def renew(self) -> None:
        if not self.renews:
            raise LostError("no place")

    def give_back(self) -> None: ...


def lost(*seeds: int, times: int = 1) -> Callable[[int], None]:
    left = dict.fromkeys(seeds, times)

    def before(seed: int) -> None:
        if left.get(seed):
            left[seed] -= 1
            raise LostError("gone")

    return before


@pytest.fixture
def started(serve_options: Options) -> Iterator[Callable[..., Service]]:
    found = list[Service]()

    def start(*drawers: Fake) -> Service:
        found.append(Service(serve_options(), drawers))
        found[-1].start()
        return found[-1]

    yield start
    for service in found:
        service.stop()


def submit(service: Service, *seeds: int) -> Job:
    return service.submit("demo", [GenerateOptions("x", seed=seed) for seed in seeds])


def test_two_draw_at_once(started: Callable[..., Service]) -> None:
    both = Barrier(2)
    service = started(*(Fake(lambda seed: both.wait(MINUTE_S)) for _ in range(2)))
    jobs = [submit(service, 1), submit(service, 2)]  # each waits for the other one
    assert all(service.board.wait(job, MINUTE_S) and job.state == DONE for job in jobs)


@pytest.mark.parametrize("renews", [True, False])
def test_a_job_of_a_lost_worker_is_finished_by_another(started: Callable[..., Service], renews: bool) -> None:
    before = lost(3)
    drawers = Fake(before, renews), Fake(before, renews)
    service = started(*drawers)
    job = submit(service, 1, 2, 3, 4)
    assert service.board.wait(job, MINUTE_S) and job.state == DONE
    assert [picture.seed for picture in job.pictures] == [1, 2, 3, 4]
    assert sorted(drawers[0].orders + drawers[1].orders) == [[1, 2, 3, 4], [3, 4]]  # what was there is not drawn again
    known = service.history.job(job.id)
    assert known["state"] == DONE and len(known["pictures"]) == 4


def test_a_job_that_ends_workers_fails(started: Callable[..., Service]) -> None:
    service = started(Fake(lost(1, times=9)))
    job = submit(service, 1)
    assert service.board.wait(job, MINUTE_S) and job.state == FAILED and job.losses == MOST_LOSSES
    assert "workers ended while they drew it" in job.failure.message
    other = submit(service, 2)
    assert service.board.wait(other, MINUTE_S) and other.state == DONE


def test_a_cancelled_job_is_not_drawn_by_another(started: Callable[..., Service]) -> None:
    found = list[Job]()

    def before(seed: int) -> None:
        service.board.cancel(found[0])
        raise LostError("gone")

    service = started(Fake(before))
    found.append(Job("demo", [GenerateOptions("x")]))
    service.board.submit(found[0], lambda job: service.history.put(job, {}))
    assert service.board.wait(found[0], MINUTE_S) and found[0].state == "cancelled"
