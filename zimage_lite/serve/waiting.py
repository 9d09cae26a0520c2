"""Between the worker's thread and the event loop: bodies read, jobs waited for, their changes told as events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import StreamingResponse

from .board import Board
from .fields import FieldError
from .jobs import Job

HEARTBEAT_S = 15.0  # of streams: what stands between drops them otherwise
LOOK_S = 1.0  # whether a client is still there


async def json_of(request: Request) -> dict[str, Any]:
    """The body's object. Raises FieldError."""
    raw = await request.body()
    try:
        values = await run_in_threadpool(json.loads, raw or b"{}")
    except (ValueError, RecursionError) as error:
        raise FieldError("the body is not JSON in UTF-8") from error
    if not isinstance(values, dict):
        raise FieldError(f"the body: got {type(values).__name__}, expected an object")
    return values


@contextmanager
def woken_by(board: Board) -> Iterator[asyncio.Event]:
    """Yields what is set at each change."""
    loop, event = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits there
            loop.call_soon_threadsafe(event.set)

    with board.listening(wake):
        yield event


async def changed(event: asyncio.Event, seconds: float) -> bool:
    """Whether it was, in that time."""
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except asyncio.TimeoutError:
        return False
    event.clear()
    return True


async def over(board: Board, job: Job, request: Request) -> bool:
    """Waits for it. False if the client went, whose job, if nobody else's, goes too."""
    looked = time.monotonic()
    with woken_by(board) as event:
        while not job.over:
            await changed(event, LOOK_S)
            if time.monotonic() - looked >= LOOK_S:  # however often something changes
                looked = time.monotonic()
                if await request.is_disconnected():
                    _leave(board, job)
                    return False
    return True


def _leave(board: Board, job: Job) -> None:
    if job.leaves:
        board.cancel(job)


def event_stream(events: AsyncIterator[str], finished: Callable[[], object] = lambda: None) -> StreamingResponse:
    """finished: called once it is over, however it ended."""

    async def guarded() -> AsyncIterator[str]:
        try:
            async for event in events:
                yield event
        finally:
            finished()

    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(guarded(), media_type="text/event-stream", headers=headers)


def event_text(name: str | None, data: Mapping[str, Any], number: int | None = None) -> str:
    """One event. JSON has no line breaks of its own."""
    lines = [f"id: {number}"] if number is not None else []
    lines += [f"event: {name}"] if name else []
    return "\n".join([*lines, f"data: {json.dumps(data)}", "", ""])


COMMENT = ": still here\n\n"


async def job_events(
    board: Board, job: Job, leaving: bool = False, previews: bool = True
) -> AsyncIterator[dict[str, Any] | None]:
    """Its facts whenever they change, None now and then when they do not; the last are those of the end. leaving:
    whoever goes before is the one who wanted it; previews: they are looked at."""
    seen = -1
    try:
        with woken_by(board) as event, board.watching(job) if previews else nullcontext():
            while True:
                facts = board.facts(job)
                if facts["version"] != seen:
                    seen = facts["version"]
                    yield facts
                if job.over and facts["state"] == job.state:
                    return
                if not await changed(event, HEARTBEAT_S):
                    yield None
    finally:
        if leaving:
            _leave(board, job)
