"""Where the server listens."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from threading import Event
from typing import Any

import pytest

from zimage_lite.errors import UserError
from zimage_lite.serve import running
from zimage_lite.serve.options import ServeOptions
from zimage_lite.serve.running import _socket


@pytest.mark.parametrize(
    ("display", "changes", "opened"),
    [(":0", {}, 1), ("", {}, 0), (":0", {"host": "0.0.0.0", "no_auth": True}, 0), (":0", {"browse": False}, 0)],
)
def test_the_page_is_opened_where_somebody_can_see_it(
    serve_options: Callable[..., ServeOptions], monkeypatch: pytest.MonkeyPatch, display: str,
    changes: dict[str, Any], opened: int,
) -> None:  # fmt: skip
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    seen, said, is_open = list[str](), list[str](), Event()
    monkeypatch.setattr(running.webbrowser, "open", lambda address: (seen.append(address), is_open.set()))
    monkeypatch.setattr(running.uvicorn.Server, "run", lambda *_: None)
    browse = changes.pop("browse", True)
    running.run(serve_options(port=0, **changes), said.append, browse)
    assert is_open.wait(10 if opened else 0.1) is bool(opened)
    assert seen == [said[-1].split()[0]] * opened


def test_answers_are_not_held_back() -> None:
    """asyncio turns Nagle's delay off only where the protocol is named: an answer took 44 ms instead of 1."""
    with _socket("127.0.0.1", 0) as listening:
        assert listening.proto == socket.IPPROTO_TCP
        with socket.create_connection(listening.getsockname()) as client:
            accepted, _ = listening.accept()
            assert accepted.proto == socket.IPPROTO_TCP and client
            accepted.close()


def test_a_port_that_is_taken() -> None:
    with _socket("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(UserError, match=rf"127\.0\.0\.1, port {port}: cannot listen .*choose another with --port"):
            _socket("127.0.0.1", port)


def test_a_client_that_left_is_no_news(
    serve_options: Callable[..., ServeOptions], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncio on Windows logs a traceback for each (AUTOMATIC1111's issue 7524)."""
    monkeypatch.setattr(running.uvicorn.Server, "run", lambda *_: None)
    running.run(serve_options(port=0), lambda line: None)
    log, callback = logging.getLogger("asyncio"), "Exception in callback _ProactorBasePipeTransport"
    log.error("%s._call_connection_lost(None)", callback, exc_info=ConnectionResetError(10054, "closed by the remote"))
    assert not caplog.records
    log.error("%s._call_connection_lost(None)", callback, exc_info=OSError("another fault"))
    log.error("%s._loop_reading()", callback, exc_info=ConnectionResetError(10054, "closed by the remote"))
    assert len(caplog.records) == 2
