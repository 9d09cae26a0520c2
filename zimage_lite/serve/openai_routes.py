"""/v1/images/... and /v1/models, as the openai package and those who speak like it ask."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..config import SIZE_MULTIPLE
from .failures import body, failure, of_job
from .fields import ALIASES, FIELDS, FieldError, asked_for
from .jobs import Job, Picture
from .openai_answers import Answer
from .service import Service
from .uploads import checked, mask_of_alpha, picture_of
from .waiting import COMMENT, event_stream, event_text, job_events, json_of, over

# What else than prompt, model and n may stand beside OpenAI's fields, by our names.
_EXTENSIONS = (FIELDS.keys() | ALIASES.keys()) - {"image", "mask", "width", "height", "control_image", "references"}
_NUMBERS = {name for name, kind in FIELDS.items() if kind.schema.get("type") in ("number", "integer")}


class OpenAIRoutes:
    def __init__(self, service: Service) -> None:
        self.service = service

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{model:path}", self.model, methods=["GET"]),
            Route("/v1/images/generations", self.generations, methods=["POST"]),
            Route("/v1/images/edits", self.edits, methods=["POST"]),
        ]

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(name) for name in self.service.catalog.models]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in self.service.catalog.models:
            return failure(request.url.path, 404, f"there is no model {name[:60]}", "model_not_found", "model")
        return JSONResponse(_model(name))

    async def generations(self, request: Request) -> Response:
        values = await json_of(request)
        own = {"image": values["image"]} if isinstance(values.get("image"), str) else {}
        return await self._drawn(request, values, own, "image_generation")

    async def edits(self, request: Request) -> Response:
        if request.headers.get("content-type", "").startswith("multipart/"):
            values, images, mask = await self._form(request)
        else:
            values = await json_of(request)
            images, mask = await run_in_threadpool(self._from_json, values)
        own = await run_in_threadpool(self._pictures, images, mask, self._sees(values.get("model")))
        return await self._drawn(request, values, own, "image_edit")

    def _sees(self, model: object) -> bool:
        """Whether pictures may stand beside the prompt."""
        catalog = self.service.catalog
        return catalog.sees(model if isinstance(model, str) and model in catalog.models else catalog.models[0])

    async def _form(self, request: Request) -> tuple[dict[str, Any], list[bytes], bytes | None]:
        """Its texts, its images, and the mask."""
        limits = self.service.options.limits
        async with request.form(max_files=17, max_fields=60, max_part_size=limits.prompt_chars * 4) as form:
            values = {name: value for name, value in form.items() if isinstance(value, str)}
            images = [await file.read() for file in _files(form, "image")]
            masks = [await file.read() for file in _files(form, "mask")[:1]]
        if not images:
            raise FieldError("image: there is none", "image")
        return {**values, **_numbers(values)}, images, masks[0] if masks else None

    def _from_json(self, values: Mapping[str, Any]) -> tuple[list[bytes], bytes | None]:
        most, images = self.service.options.limits.picture_pixels, values.get("images")
        if not isinstance(images, list) or not images or not all(isinstance(image, dict) for image in images):
            raise FieldError("images: expected a list of objects with image_url", "images")
        mask = values.get("mask")
        given = [picture_of(image.get("image_url"), "image", most) for image in images]
        return given, picture_of(mask.get("image_url"), "mask", most) if isinstance(mask, dict) else None

    def _pictures(self, images: list[bytes], mask: bytes | None, sees: bool) -> dict[str, Any]:
        """Drawn over is the first image, and only that; but a model that sees pictures beside the prompt sees the
        others, and where there is no mask all of them."""
        most = self.service.options.limits.picture_pixels
        given = [_base64(checked(image, "image", most)) for image in images[: None if sees else 1]]
        if mask is None and sees:
            return {"references": given}
        found: dict[str, Any] = {"image": given[0], **({"references": given[1:]} if given[1:] else {})}
        return found if mask is None else {**found, "mask": _base64(mask_of_alpha(checked(mask, "mask", most)))}

    async def _drawn(
        self, request: Request, values: dict[str, Any], pictures: Mapping[str, Any], kind: str
    ) -> Response:
        answer = Answer.of(values)
        asked = {name: value for name, value in values.items() if name in _EXTENSIONS and name != "model"}
        if values.get("model") in self.service.catalog.models:  # clients send whatever their users chose elsewhere
            asked["model"] = values["model"]
        asked |= {**_size(values.get("size")), **pictures}
        if not isinstance(asked.get("prompt"), str):
            raise FieldError("prompt: expected a text", "prompt")
        service = self.service
        model, requests = await run_in_threadpool(asked_for, asked, service.catalog, service.options.limits, False)
        job = await run_in_threadpool(service.submit, model, requests, "openai", True)
        if answer.stream:
            return event_stream(self._streamed(job, answer, kind, request.url.path))
        if not await over(service.board, job, request):
            return Response(status_code=499)
        return of_job(request.url.path, job) or JSONResponse(
            await run_in_threadpool(self._answer, job, answer, request)
        )

    def _answer(self, job: Job, answer: Answer, request: Request) -> dict[str, Any]:
        data = []
        for picture in job.pictures:
            url = str(request.url_for("picture", name=picture.name)) if answer.as_url else None
            shown = {"url": url} if url else {"b64_json": self._base64(picture, answer)}
            data.append({**shown, "seed": picture.seed})
        return {"created": int(job.created), "data": data, **answer.facts(job.pictures[0]), "usage": _USAGE}

    def _base64(self, picture: Picture, answer: Answer) -> str:
        path = self.service.history.picture(picture.name)
        if path is None:  # deleted meanwhile
            raise FieldError("the picture was deleted")
        return base64.b64encode(answer.encoded(path)).decode()

    async def _streamed(self, job: Job, answer: Answer, kind: str, path: str) -> AsyncIterator[str]:
        shown, sent = 0, 0
        async for facts in job_events(self.service.board, job, True, answer.partial > 0):
            if facts is None:
                yield COMMENT
                continue
            due = facts["steps"] and (facts["step"] or 0) * (answer.partial + 1) >= facts["steps"] * (shown + 1)
            if shown < answer.partial and due and (preview := job.preview):
                picture = await run_in_threadpool(answer.partial_image, preview)
                said = {"b64_json": picture, "partial_image_index": shown, "created_at": int(time.time())}
                yield event_text(
                    f"{kind}.partial_image", {"type": f"{kind}.partial_image", **said, **answer.facts(None)}
                )
                shown += 1
            for done in job.pictures[sent:] if job.over else ():
                said = {"b64_json": await run_in_threadpool(self._base64, done, answer), "created_at": int(time.time())}
                whole = {**said, **answer.facts(done), "usage": _USAGE, "seed": done.seed}
                yield event_text(f"{kind}.completed", {"type": f"{kind}.completed", **whole})
                sent += 1
        if job.state != "done":
            failed = job.failure.message if job.failure else "the job was cancelled"
            yield event_text("error", {"type": "error", **body(path, 500, failed, job.state)})


_USAGE = {
    "input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}  # fmt: skip


def _size(size: object) -> dict[str, int]:
    """Raises FieldError for what is no multiple of 16: OpenAI's clients get the size that they asked for, or none."""
    if size in (None, "", "auto"):
        return {}
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size) if isinstance(size, str) else None
    width, height = (int(found[1]), int(found[2])) if found else (0, 0)
    if not found or width % SIZE_MULTIPLE or height % SIZE_MULTIPLE or not width or not height:
        raise FieldError(f"size: got {size!r:.40}, expected auto, or such as 1024x1024 in multiples of 16", "size")
    return {"width": width, "height": height}


def _numbers(values: Mapping[str, str]) -> dict[str, Any]:
    """Of a form, where all are texts."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if ALIASES.get(name, name) in _NUMBERS or name in ("loras", "controls"):
            try:
                found[name] = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise FieldError(
                    f"{name}: got {value[:40]!r}, expected {FIELDS[ALIASES.get(name, name)].says}", name
                ) from error
    return found


def _files(form: FormData, name: str) -> list[UploadFile]:
    """`image`, or a list that is sent as `image[]`."""
    return [file for key in (name, f"{name}[]") for file in form.getlist(key) if isinstance(file, UploadFile)]


def _base64(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "zimage-lite"}
