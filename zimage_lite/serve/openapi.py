"""What /api/... takes and gives, for programs that read OpenAPI."""

from __future__ import annotations

from typing import Any

from .. import __version__
from .fields import ALIASES, FIELDS
from .options import Limits

_PATHS = {
    "/health": {"get": "Whether the server draws."},
    "/api/status": {"get": "Models and their defaults, LoRAs, samplers, limits, and how long the queue is."},
    "/api/jobs": {"get": "The history, newest first.", "post": "Order pictures: a job that waits its turn."},
    "/api/plan": {"post": "What an order would take: memory and seconds as predicted, and whether it fits."},
    "/api/jobs/{job}": {"get": "How far a job is, or what came of it.", "delete": "Remove it with its pictures."},
    "/api/jobs/{job}/cancel": {"post": "Stop a job: at once if it waits, within a step if it runs."},
    "/api/jobs/{job}/preview": {"get": "What the running picture will be like, as JPEG; 204 while there is none."},
    "/api/jobs/{job}/events": {"get": "A job's changes as server-sent events, until it is over."},
    "/api/events": {"get": "Changes of all jobs as server-sent events."},
    "/api/pictures/{name}": {"get": "A picture, as PNG."},
    "/api/given/{sha256}": {"get": "A picture that a client sent, while a job of the history was made from it."},
    "/api/read": {"post": "The settings that a picture carries."},
}  # fmt: skip
_STREAMS = ("/api/events", "/api/jobs/{job}/events")
_IMAGES = {
    "/api/jobs/{job}/preview": "image/jpeg",
    "/api/pictures/{name}": "image/png",
    "/api/given/{sha256}": "image/*",
}

_BYTES = {"type": "integer", "minimum": 0}
_SECONDS = {"type": "number", "minimum": 0, "description": "As predicted."}
_PLACE = {"place": {"enum": ["GPU memory", "Memory"]}, "planned": _BYTES, "limit": _BYTES}
_PHASE = {
    "phase": {"enum": ["encode", "picture", "denoise", "decode"]}, "device": {"enum": ["gpu", "cpu"]},
    "peak_vram_bytes": _BYTES, "peak_ram_bytes": _BYTES, "seconds": _SECONDS,
}  # fmt: skip
_PLAN = {
    "type": "object",
    "properties": {
        "fits": {"type": ["boolean", "null"], "description": "null: it cannot be said yet."},
        "message": {"type": ["string", "null"], "description": "Why it does not fit, or is not known."},
        "memory": {"type": "array", "items": {"type": "object", "properties": _PLACE}},
        "phases": {"type": "array", "items": {"type": "object", "properties": _PHASE}},
        "seconds": {**_SECONDS, "type": ["number", "null"]},
    },
}


def document(limits: Limits) -> dict[str, Any]:
    paths = {
        path: {verb: _operation(path, verb, says) for verb, says in verbs.items()} for path, verbs in _PATHS.items()
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "zimage-lite", "version": __version__},
        "paths": paths,
        "components": {"schemas": {"Request": _request(limits), "Plan": _PLAN}},
    }


def _operation(path: str, verb: str, says: str) -> dict[str, Any]:
    kind = "text/event-stream" if path in _STREAMS else _IMAGES.get(path, "application/json")
    status = {("/api/jobs", "post"): "202", ("/api/jobs/{job}", "delete"): "204"}.get((path, verb), "200")
    found: dict[str, Any] = {"summary": says, "responses": {status: {"description": says, "content": {kind: {}}}}}
    if status == "204":
        del found["responses"][status]["content"]
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    if names:
        text = {"type": "string"}
        found["parameters"] = [{"name": name, "in": "path", "required": True, "schema": text} for name in names]
        found["responses"]["404"] = {"description": "There is none of that name."}
    schema = {
        "/api/jobs": {"$ref": "#/components/schemas/Request"},
        "/api/plan": {"$ref": "#/components/schemas/Request"},
        "/api/read": {"type": "object", "required": ["image"], "properties": {"image": FIELDS["image"].schema}},
    }.get(path)
    if verb == "post" and schema:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        found["responses"]["400"] = {"description": "The request is at fault; error.param names the field."}
    if path == "/api/plan":
        found["responses"]["200"]["content"] = {"application/json": {"schema": {"$ref": "#/components/schemas/Plan"}}}
        found["responses"]["429"] = {"description": "Too many plans are made at once."}
        found["responses"]["503"] = {"description": "No worker is there."}
    if (path, verb) == ("/api/jobs", "post"):
        found["responses"]["429"] = {"description": "The queue is full; Retry-After says when to come back."}
    return found


def _request(limits: Limits) -> dict[str, Any]:
    properties = {name: dict(kind.schema) for name, kind in FIELDS.items()}
    properties |= {alias: properties[name] for alias, name in ALIASES.items()}
    properties["count"] = {**properties["count"], "minimum": 1, "maximum": limits.images, "default": 1}
    properties["steps"] = {**properties["steps"], "minimum": 1, "maximum": limits.steps}
    properties["prompt"] = {**properties["prompt"], "maxLength": limits.prompt_chars}
    return {"type": "object", "required": ["prompt"], "properties": properties, "additionalProperties": False}
