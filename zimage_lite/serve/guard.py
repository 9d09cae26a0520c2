"""What stands before every route: who may call, from where, and how much they may send.

A server on this machine is reached by every page that its user opens. So: a name that is not the server's own is
refused (DNS rebinding), a page of another origin may not send anything (CSRF), nothing tells a browser that others may
read (no CORS), and bodies are JSON or forms, counted as they come.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import socket
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .failures import failure
from .options import ServeOptions

_SAFE = ("GET", "HEAD")
_METHODS = (*_SAFE, "POST", "DELETE")
_BODIES = ("application/json", "multipart/form-data")
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'; "
    "form-action 'self'; base-uri 'none'; object-src 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
_OPEN = ("/health",)  # without a key


class Guard:
    def __init__(self, app: ASGIApp, options: ServeOptions) -> None:
        self.app, self.options = app, options
        self.hosts = frozenset(name.lower() for name in _own_names(options))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no WebSockets
            await send({"type": "websocket.close", "code": 1008})
            return
        headers, path = Headers(scope=scope), scope["path"]

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                for name, value in _HEADERS.items():
                    MutableHeaders(scope=message).setdefault(name, value)
            await send(message)

        if refused := self._refused(scope["method"], path, headers):
            status, message, code = refused
            more = {"www-authenticate": 'Basic realm="zimage-lite"'} if status == 401 else None
            await failure(path, status, message, code, headers=more)(scope, receive, sending)
            return
        await self.app(scope, _counted(receive, self.options.limits.body_bytes), sending)

    def _refused(self, method: str, path: str, headers: Headers) -> tuple[int, str, str] | None:
        """Status, message and code, or None."""
        host = headers.get("host", "")
        if not self._is_own(host):
            return 403, f"this server is not called {host[:80]!r}: start it with --allow-host to use that name", "host"
        if method not in _METHODS:
            return 405, f"{method[:20]} is not used here", "method"
        if method not in _SAFE and not _same_origin(headers, host):
            return 403, "a page of another origin may not use this server", "origin"
        if path not in _OPEN and not self._is_known(headers.get("authorization", "")):
            return 401, "a key is required: send it as Bearer KEY, or as the password of Basic", "invalid_api_key"
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdecimal() or int(length[:20]) > self.options.limits.body_bytes:
            return 413, _too_large(self.options.limits.body_bytes), "too_large"
        has_body = length != "0" or "transfer-encoding" in headers
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if has_body and kind not in _BODIES:
            return 415, f"Content-Type: got {kind[:60] or 'none'}, expected {' or '.join(_BODIES)}", "content_type"
        return None

    def _is_own(self, host: str) -> bool:
        """An address cannot be made to lead elsewhere, only a name can."""
        name = _hostname(host)
        return name in self.hosts or _is_address(name)

    def _is_known(self, authorization: str) -> bool:
        """Whoever sends the key; anybody if there is none, whatever they send."""
        if not self.options.api_key:
            return True
        kind, _, given = authorization.partition(" ")
        if kind.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode().partition(":")[2]
            except (ValueError, binascii.Error):
                given = ""
        return hmac.compare_digest(given.strip().encode(), self.options.api_key.encode())


def _own_names(options: ServeOptions) -> Iterable[str]:
    yield from ("localhost", options.host, *options.hosts)
    if options.host not in ("127.0.0.1", "localhost", "::1"):
        own = socket.gethostname()
        yield from (own, f"{own}.local")


def _hostname(host: str) -> str:
    """Of a Host header, without the port, in lower case; "" for what is none."""
    name, colon, port = host.strip().lower().rpartition(":")
    if host.startswith("[") or not colon:
        name, port = (host.strip().lower(), "0") if host.endswith("]") or not colon else (name, port)
    return name.removeprefix("[").removesuffix("]") if port.isdecimal() else ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _same_origin(headers: Headers, host: str) -> bool:
    """Browsers say where a request comes from; other programs say nothing."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    if origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
        return False
    return site in ("none", "same-origin")


def _counted(receive: Receive, most: int) -> Receive:
    """Whatever the header says."""
    seen = 0

    async def counting() -> Message:
        nonlocal seen
        message = await receive()
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            if seen > most:
                raise HTTPException(413, _too_large(most))
        return message

    return counting


def _too_large(most: int) -> str:
    return f"too large: at most {most / 1e6:g} MB are taken"
