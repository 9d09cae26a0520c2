"""Servers in this process, for tests."""

from __future__ import annotations

import base64
import json
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from threading import Thread
from typing import Any

import numpy as np
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

from zimage_lite.serve.app import app_of
from zimage_lite.serve.options import ServeOptions
from zimage_lite.serve.service import Service
from zimage_lite.serve.worker import Drawer

BASE = "http://localhost:7860"


@contextmanager
def serving(options: ServeOptions) -> Iterator[tuple[TestClient, Service]]:
    service = Service(options)
    with TestClient(app_of(service), base_url=BASE, raise_server_exceptions=False) as client:
        yield client, service


@contextmanager
def listening(options: ServeOptions, drawers: Sequence[Drawer] = ()) -> Iterator[tuple[str, Service]]:
    """A real one, on a port of its own: its address. drawers: see Service."""
    service, place = Service(options, drawers), socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app_of(service), log_level="warning", ws="none"))
    thread = Thread(target=server.run, args=([place],), daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not server.started and time.monotonic() < end:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{place.getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join(60)
        place.close()


def finished(client: TestClient, job: str, seconds: float = 60) -> dict[str, Any]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        facts = client.get(f"/api/jobs/{job}").json()
        if facts["state"] not in ("queued", "running"):
            return facts
        time.sleep(0.01)
    raise AssertionError(f"not over in {seconds} s: {facts}")


def png(width: int = 64, height: int = 64, alpha: np.ndarray | None = None, mode: str = "RGB") -> bytes:
    """Noise; alpha: [height, width] uint8."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
    if alpha is not None:
        image.putalpha(Image.fromarray(alpha))
    file = BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def base64_of(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def picture(text: str) -> Image.Image:
    """Of base64."""
    return Image.open(BytesIO(base64.b64decode(text, validate=True)))


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and data of server-sent events."""
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line and not line.startswith(":"))
        if "data" in lines:
            found.append((lines.get("event", ""), json.loads(lines["data"])))
    return found
