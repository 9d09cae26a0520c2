"""The queue: bounded, in order, and every change is seen by whoever asks, in whatever order threads run."""

from __future__ import annotations

from threading import Event, Thread

import pytest

from zimage_lite.config import GenerateOptions
from zimage_lite.errors import UserError
from zimage_lite.serve import board as board_file
from zimage_lite.serve.board import Board, QueueFullError
from zimage_lite.serve.jobs import CANCELLED, DONE, QUEUED, RUNNING, Job


def job(prompt: str = "x") -> Job:
    return Job("demo", [GenerateOptions(prompt)])


def test_first_come_first_served() -> None:
    board = Board(3)
    first, second, third = (board.submit(job(name)) for name in "abc")
    assert [board.facts(one)["position"] for one in (first, second, third)] == [0, 1, 2]
    assert board.next(0) is first and first.state == RUNNING
    assert [board.facts(one)["position"] for one in (first, second, third)] == [None, 1, 2]
    board.finish(first, DONE)
    assert board.facts(second)["position"] == 0
    assert board.next(0) is second and board.running is second


def test_a_full_queue_says_when_to_come_back() -> None:
    board, seen = Board(2), list[Job]()
    for _ in range(2):
        board.submit(job(), seen.append)
    with pytest.raises(QueueFullError, match="2 jobs wait already; try again in 20 s") as raised:
        board.submit(job(), seen.append)
    assert raised.value.seconds == 20 and len(seen) == 2  # nothing was recorded of what was refused
    board.next(0)
    board.submit(job())


def test_what_cannot_be_recorded_has_no_place() -> None:
    def failing(job: Job) -> None:
        raise UserError("the disk is full")

    board = Board(1)
    with pytest.raises(UserError, match="disk"):
        board.submit(job(), failing)
    assert board.waiting() == 0 and board.since(0) == []


def test_who_waits_is_cancelled_at_once_and_who_runs_is_told() -> None:
    board = Board(3)
    first, second, third = (board.submit(job(name)) for name in "abc")
    board.next(0)
    assert board.cancel(second) and second.state == CANCELLED
    assert board.facts(third)["position"] == 1
    assert board.cancel(first) and first.state == RUNNING and first.cancelled.is_set()
    board.finish(first, CANCELLED)
    assert not board.cancel(first) and not board.cancel(second)


def test_who_listens_gets_each_job_as_it_is_now() -> None:
    board, woken = Board(3), list[int]()
    with board.listening(lambda: woken.append(board.version)):
        first, second = board.submit(job("a")), board.submit(job("b"))
        seen = board.version
        board.next(0)
        for done in (1, 2, 3):
            board.change(first, phase="denoise", done=done, total=8)
    changed = board.since(seen)
    assert [(facts["prompt"], facts["state"], facts["step"]) for facts in changed] == [
        ("b", QUEUED, None),  # its place is another
        ("a", RUNNING, 3),
    ]
    assert board.since(board.version) == [] and len(woken) == 6
    board.change(second, done=1)
    assert len(woken) == 6  # not after it stopped listening


@pytest.mark.parametrize("closes", [False, True])
def test_the_worker_is_woken(closes: bool) -> None:
    board, got = Board(1), list[Job | None]()
    thread = Thread(target=lambda: got.append(board.next(60)))
    thread.start()
    wanted = None if closes else board.submit(job())
    if closes:
        board.close()
    thread.join(30)
    assert got == [wanted]


def test_a_server_that_stops_takes_no_more() -> None:
    board = Board(3)
    first, second = board.submit(job()), board.submit(job())
    board.next(0)
    assert board.close() == [second] and first.cancelled.is_set()
    with pytest.raises(UserError, match="stopping"):
        board.submit(job())


def test_what_is_over_is_forgotten_some_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_file, "KEPT", 3)
    board, done = Board(1), list[Job]()
    for _ in range(10):
        done.append(board.submit(job()))
        board.next(0)
        board.finish(done[-1], DONE)
    assert [board.get(one.id) is not None for one in done] == [False] * 6 + [True] * 4  # one more until the next


def test_a_job_is_recorded_before_anybody_hears_of_it() -> None:
    order, board = list[str](), Board(1, lambda job: order.append(job.state))
    with board.listening(lambda: order.append("heard")):
        one = board.submit(job(), lambda job: order.append("accepted"))
        board.next(0)
        board.finish(one, DONE)
    assert order == ["accepted", "heard", RUNNING, "heard", DONE, "heard"]


def test_waiting_for_a_job() -> None:
    board, ready = Board(1), Event()
    one = board.submit(job())
    assert not board.wait(one, 0)

    def finish() -> None:
        ready.wait(30)
        board.finish(one, DONE)

    board.next(0)
    thread = Thread(target=finish)
    thread.start()
    ready.set()
    assert board.wait(one, 30)
    thread.join()


def test_no_two_jobs_are_of_the_same_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the clock says, which on Windows stands still for 15 ms: the history is paged by it."""
    monkeypatch.setattr("zimage_lite.serve.jobs.time.time", lambda: 1.7e9)
    moments = [Job("demo", []).created for _ in range(100)]
    assert moments == sorted(set(moments))
