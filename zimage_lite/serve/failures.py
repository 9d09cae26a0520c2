"""What went wrong, in the shape that the clients of each API expect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from ..errors import UserError
from .board import QueueFullError
from .catalog import UnknownError
from .fields import FieldError
from .history import StorageError
from .jobs import CANCELLED, LOST, Job

OPENAI, A1111 = "/v1/", "/sdapi/"
_STATUS = {"too_large": 400, "invalid_request": 400, "out_of_memory": 500, "internal": 500, "storage": 507}


def failure(
    path: str, status: int, message: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """path: of the request, which tells the API."""
    return JSONResponse(
        body(path, status, message, code, param), status, {"x-should-retry": "false"} | dict(headers or {})
    )


def body(path: str, status: int, message: str, code: str, param: str | None = None) -> dict[str, Any]:
    if path.startswith(A1111):
        return {"error": code, "detail": message, "body": "", "errors": message}
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def of_error(path: str, error: UserError) -> Response:
    """Of what a request is refused for."""
    if isinstance(error, QueueFullError):
        headers = {"retry-after": str(error.seconds), "x-should-retry": "true"}
        return failure(path, 429, str(error), "queue_full", headers=headers)
    if isinstance(error, UnknownError):
        return failure(path, 404 if path.startswith("/api/") else 400, str(error), "not_found")
    if isinstance(error, StorageError):
        return failure(path, 507, str(error), "storage")
    param = error.param if isinstance(error, FieldError) else None
    return failure(path, 400, str(error), "invalid_request", param)


def of_job(path: str, job: Job) -> Response | None:
    """Of one that is over; None if it was drawn."""
    if job.failure and job.state != LOST:
        status, code = _STATUS[job.failure.code], job.failure.code
        return failure(path, status, job.failure.message, code, "size" if code == "too_large" else None)
    if job.state in (CANCELLED, LOST):
        return failure(path, 503, "the job was cancelled", "cancelled")
    return None
