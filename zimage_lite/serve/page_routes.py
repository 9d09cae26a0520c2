"""/: the page to draw with. Three kinds of files that ship with the package, and nothing from anywhere else."""

from __future__ import annotations

import hashlib
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_INDEX = "index.html"
# Beside what the guard sends: nothing is read as HTML (trusted types), and no form is sent but by the module.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)


class PageRoutes:
    """Read once: what a client names is looked up, never opened."""

    def __init__(self) -> None:
        folder = files("zimage_lite") / "serve" / "page"
        self.files = {
            file.name: (kind, file.read_bytes())
            for file in folder.iterdir()
            for ending, kind in _KINDS.items()
            if file.name.endswith(ending)
        }

    def routes(self) -> list[Route]:
        return [
            Route("/", self.index, methods=["GET"]),
            Route("/page/{name}", self.file, methods=["GET"], name="page"),
        ]

    async def index(self, request: Request) -> Response:
        return self._answer(request, _INDEX)

    async def file(self, request: Request) -> Response:
        return self._answer(request, request.path_params["name"])

    def _answer(self, request: Request, name: str) -> Response:
        if name not in self.files:
            return Response("there is no such file", 404, media_type="text/plain")
        kind, content = self.files[name]
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        headers = {"etag": tag, "cache-control": "no-cache", "content-security-policy": _POLICY}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)
