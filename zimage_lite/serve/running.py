"""A server in this process, until it is interrupted."""

from __future__ import annotations

import logging
import os
import socket
import sys
import webbrowser
from collections.abc import Callable, Sequence
from threading import Thread

import uvicorn

from ..errors import UserError
from ..units import counted
from .app import app_of
from .options import LOOPBACK, ServeOptions
from .service import Service
from .worker import Drawer

_KEEP_ALIVE_S = 30
_BACKLOG, _CONNECTIONS = 128, 256


def run(
    options: ServeOptions, say: Callable[[str], None], browse: bool = False, drawers: Sequence[Drawer] = ()
) -> None:
    """say: takes lines for people; browse: also opens the page; drawers: see Service. Raises UserError."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("asyncio").addFilter(_is_news)
    listening = _socket(options.host, options.port)
    with listening:
        service = Service(options, drawers)
        if service.lost:
            say(
                f"note: {counted(len(service.lost), 'job')} of the last time had not been drawn; the history names them"
            )
        host = f"[{options.host}]" if ":" in options.host else options.host
        address = f"http://{host}:{listening.getsockname()[1]}"
        say(f"{address}  the page; OpenAI's API at {address}/v1, A1111's at {address}; Ctrl-C ends it")
        if browse and options.host in LOOPBACK and _has_screen():
            # What connects before the server answers waits. In a thread: some browsers return when they are closed.
            Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        config = uvicorn.Config(
            app_of(service), log_level="warning", access_log=False, server_header=False, date_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S, limit_concurrency=_CONNECTIONS, h11_max_incomplete_event_size=2**15,
            timeout_graceful_shutdown=3, ws="none",
        )  # fmt: skip
        uvicorn.Server(config).run([listening])


def _is_news(record: logging.LogRecord) -> bool:
    """Not the traceback of asyncio on Windows for each client that was gone before its connection was shut down."""
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, ConnectionResetError) and "_call_connection_lost" in record.getMessage())


def _has_screen() -> bool:
    """Else the browser that is found may be one for terminals, which takes this one over."""
    return sys.platform in ("win32", "darwin") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def _socket(host: str, port: int) -> socket.socket:
    """Bound before anything else is done. Raises UserError."""
    try:
        wanted = {"type": socket.SOCK_STREAM, "proto": socket.IPPROTO_TCP, "flags": socket.AI_PASSIVE}
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, **wanted)[0]
        found = socket.socket(family, kind, protocol)  # named, or asyncio leaves Nagle's delay on: 44 ms an answer
    except OSError as error:
        raise UserError(f"--host {host}: no address of this machine ({error.strerror})") from error
    try:
        if sys.platform != "win32":  # there it would let two servers share a port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(place)
        found.listen(_BACKLOG)
    except OSError as error:
        found.close()
        fix = "end what listens there, or choose another with --port"
        raise UserError(f"{host}, port {port}: cannot listen ({error.strerror})", fix=fix) from error
    return found
