"""The routes together, behind the guard."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from ..errors import UserError
from .a1111_routes import A1111Routes
from .failures import failure, of_error
from .guard import Guard
from .openai_routes import OpenAIRoutes
from .own_routes import OwnRoutes
from .page_routes import PageRoutes
from .service import Service

_log = logging.getLogger(__name__)


def app_of(service: Service) -> ASGIApp:
    """Starts and stops the service with the server."""

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()

    routes = [
        *OwnRoutes(service).routes(), *OpenAIRoutes(service).routes(), *A1111Routes(service).routes(),
        *PageRoutes().routes(),
    ]  # fmt: skip
    handlers = {UserError: _refused, HTTPException: _http, Exception: _broken}
    return Guard(Starlette(routes=routes, lifespan=life, exception_handlers=handlers), service.options)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, UserError)
    return of_error(request.url.path, error)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, said = request.url.path, str(error.detail)
    if error.status_code == 404:
        said = f"there is nothing at {path[:100]}"
        said += "; /api/openapi.json has what there is" if path.startswith("/api/") else ""
    return failure(path, error.status_code, said, "http", headers=error.headers)


async def _broken(request: Request, error: Exception) -> Response:
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return failure(request.url.path, 500, f"{type(error).__name__}: the server's log has more", "internal")
