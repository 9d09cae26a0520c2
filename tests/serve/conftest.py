"""A server of the demo, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from served import serving
from starlette.testclient import TestClient

from zimage_lite.config import RuntimeOptions
from zimage_lite.serve.options import Limits, ServeOptions
from zimage_lite.serve.service import Service


@pytest.fixture
def serve_options(tmp_path: Path) -> Callable[..., ServeOptions]:
    """Makes options for a server of the demo on the CPU."""

    def make(**changes: Any) -> ServeOptions:
        (tmp_path / "loras").mkdir(exist_ok=True)
        own = {"folder": tmp_path / "served", "models": {"demo": "demo"}, "lora_dir": tmp_path / "loras"}
        own["runtime"] = RuntimeOptions("cpu", cache=False)
        limits = changes.pop("limits", {})
        return ServeOptions(**{**own, "limits": Limits(**limits), **changes})

    return make


@pytest.fixture
def service(serve_options: Callable[..., ServeOptions]) -> Iterator[Service]:
    found = Service(serve_options())
    found.start()
    yield found
    found.stop()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The demo's matrices are so small that a second thread only waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def client(serve_options: Callable[..., ServeOptions]) -> Iterator[TestClient]:
    """Speaks to a server of the demo."""
    with serving(serve_options()) as (found, _):
        yield found
