"""/api/...: what the page uses, and scripts may: jobs as such, not one call that waits."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from .. import __version__
from ..config import CONTROL_SOURCES, SAMPLERS, SCHEDULES
from ..pictures.saving import infotext_of, recipe_of
from ..workers.orders import LostError
from .failures import failure
from .fields import asked_for
from .openapi import document
from .service import Service
from .uploads import media_type, picture_of
from .waiting import COMMENT, HEARTBEAT_S, changed, event_stream, event_text, job_events, json_of, woken_by

_PAGE = 50  # jobs
_UNCHANGING = {"cache-control": "private, max-age=31536000, immutable"}
_PLANS = 4  # at once, each of which holds a thread


class OwnRoutes:
    def __init__(self, service: Service) -> None:
        self.service, self.streams, self.plans = service, 0, 0

    def routes(self) -> list[Route]:
        return [
            Route("/health", self.health, methods=["GET"]),
            Route("/api/status", self.status, methods=["GET"]),
            Route("/api/openapi.json", self.openapi, methods=["GET"]),
            Route("/api/jobs", self.jobs, methods=["GET"]),
            Route("/api/jobs", self.submit, methods=["POST"]),
            Route("/api/plan", self.plan, methods=["POST"]),
            Route("/api/events", self.events, methods=["GET"]),
            Route("/api/read", self.read, methods=["POST"]),
            Route("/api/jobs/{job}", self.job, methods=["GET"]),
            Route("/api/jobs/{job}", self.delete, methods=["DELETE"]),
            Route("/api/jobs/{job}/cancel", self.cancel, methods=["POST"]),
            Route("/api/jobs/{job}/preview", self.preview, methods=["GET"]),
            Route("/api/jobs/{job}/events", self.job_events, methods=["GET"]),
            Route("/api/pictures/{name}", self.picture, methods=["GET"], name="picture"),
            Route("/api/given/{sha256}", self.given, methods=["GET"]),
        ]

    async def health(self, request: Request) -> Response:
        return JSONResponse({"ok": any(worker.is_alive() for worker in self.service.workers)})

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(document(self.service.options.limits))

    async def status(self, request: Request) -> Response:
        service, board = self.service, self.service.board
        running = board.running
        return JSONResponse({
            "version": __version__, "models": service.catalog.models, "defaults": service.catalog.defaults(),
            "loras": sorted(service.catalog.loras()), "controls": list(service.catalog.controls),
            "control_sources": CONTROL_SOURCES,
            "samplers": SAMPLERS, "schedules": SCHEDULES, "waiting": board.waiting(), "places": board.places,
            "workers": sum(worker.is_alive() for worker in service.workers),
            "running": running.id if running else None, "lost": service.lost, "changes": board.version,
            "limits": vars(service.options.limits),
        })  # fmt: skip

    async def submit(self, request: Request) -> Response:
        values, service = await json_of(request), self.service
        model, requests = await run_in_threadpool(asked_for, values, service.catalog, service.options.limits)
        job = await run_in_threadpool(service.submit, model, requests)
        return JSONResponse(service.board.facts(job), 202, {"location": f"/api/jobs/{job.id}"})

    async def plan(self, request: Request) -> Response:
        """Of what `submit` takes, while jobs are drawn. That it does not fit is an answer, not an error."""
        if self.plans >= _PLANS:
            return _too_many(request, "plans are made")
        self.plans += 1
        try:
            values, service = await json_of(request), self.service
            asked = await run_in_threadpool(asked_for, values, service.catalog, service.options.limits)
            return JSONResponse(await run_in_threadpool(service.plan, *asked))
        except LostError as error:
            return failure(request.url.path, 503, str(error), "lost")
        finally:
            self.plans -= 1

    async def jobs(self, request: Request) -> Response:
        """The history, newest first; `before` is the time of the last one of the page before."""
        try:
            limit = min(max(int(request.query_params.get("limit", _PAGE)), 1), 200)
            before = float(request.query_params.get("before", "inf"))
        except ValueError:
            return failure(request.url.path, 400, "limit and before are numbers", "invalid_request")
        found = await run_in_threadpool(self.service.history.jobs, limit, min(before, 1e12))
        live = {facts["id"]: facts for facts in self.service.board.since(0)}
        return JSONResponse({"jobs": [{**facts, **live.get(facts["id"], {})} for facts in found]})

    async def job(self, request: Request) -> Response:
        facts = await run_in_threadpool(self.service.facts, request.path_params["job"])
        return JSONResponse(facts) if facts else _no_such(request, "job")

    async def delete(self, request: Request) -> Response:
        gone = await run_in_threadpool(self.service.delete, request.path_params["job"])
        return Response(status_code=204) if gone else _no_such(request, "job")

    async def cancel(self, request: Request) -> Response:
        """Of one that is over already it changes nothing."""
        if not (job := self.service.board.get(request.path_params["job"])):
            return _no_such(request, "job")
        self.service.board.cancel(job)
        return JSONResponse(self.service.board.facts(job))

    async def preview(self, request: Request) -> Response:
        """204 while there is none: before the first step, after the last, and where nobody looked before."""
        if not (job := self.service.board.get(request.path_params["job"])):
            return _no_such(request, "job")
        self.service.board.glance(job)
        if not job.preview:
            return Response(status_code=204)
        return Response(job.preview, media_type="image/jpeg", headers={"cache-control": "no-store"})

    async def picture(self, request: Request) -> Response:
        path = await run_in_threadpool(self.service.history.picture, request.path_params["name"])
        if path is None:
            return _no_such(request, "picture")
        return FileResponse(path, media_type="image/png", headers=_UNCHANGING)

    async def given(self, request: Request) -> Response:
        """A picture that a client sent for a job that the history has, by its hash."""
        path = await run_in_threadpool(self.service.history.kept.path, request.path_params["sha256"])
        if path is None:
            return _no_such(request, "picture")
        return FileResponse(path, media_type=await run_in_threadpool(media_type, path), headers=_UNCHANGING)

    async def read(self, request: Request) -> Response:
        """What a picture says of itself."""
        values, most = await json_of(request), self.service.options.limits.picture_pixels
        raw = await run_in_threadpool(picture_of, values.get("image"), "image", most)
        recipe, text = await run_in_threadpool(lambda: (recipe_of(raw), infotext_of(raw)))
        return JSONResponse({"settings": recipe, "text": text})

    async def job_events(self, request: Request) -> Response:
        if not (job := self.service.board.get(request.path_params["job"])):
            return _no_such(request, "job")
        return self._streamed(request, self._of_job(job))

    async def _of_job(self, job: Any) -> AsyncIterator[str]:
        async for facts in job_events(self.service.board, job):
            yield event_text("job", facts, facts["version"]) if facts else COMMENT

    async def events(self, request: Request) -> Response:
        """Of all jobs, from the change on that the client has seen last: it may come back and miss nothing."""
        last = request.headers.get("last-event-id") or request.query_params.get("since", "0")
        since = int(last[:18]) if last.isascii() and last.isdecimal() else 0
        return self._streamed(request, self._of_all(since))

    async def _of_all(self, since: int) -> AsyncIterator[str]:
        board = self.service.board
        since = since if since <= board.version else 0  # of a server before this one
        with woken_by(board) as event, board.watching():
            while not board.closed:
                for facts in board.since(since):
                    since = facts["version"]
                    yield event_text("job", facts, since)
                if not await changed(event, HEARTBEAT_S):
                    yield COMMENT

    def _streamed(self, request: Request, events: AsyncIterator[str]) -> Response:
        if self.streams >= self.service.options.limits.streams:
            return _too_many(request, "streams are open")
        self.streams += 1

        def finished() -> None:
            self.streams -= 1

        return event_stream(events, finished)


def _too_many(request: Request, what: str) -> Response:
    return failure(request.url.path, 429, f"too many {what}", "too_many", headers={"retry-after": "5"})


def _no_such(request: Request, what: str) -> Response:
    return failure(request.url.path, 404, f"there is no such {what}", "not_found")
