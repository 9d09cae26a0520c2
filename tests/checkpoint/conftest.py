"""Where the tests of headers write, and a Hub of our own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, serving
from huggingface_hub import constants, file_download

from zimage_lite.checkpoint import hub


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file for all the examples that hypothesis draws."""
    return tmp_path_factory.mktemp("headers") / "weights"


@pytest.fixture(scope="module")
def folder(diffusers_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model cut into several shards, as on the Hub, with files around it that nobody needs."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    diffusers_pipeline.save_pretrained(folder, max_shard_size="4MB")
    (folder / "README.md").write_text("# Tiny")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(bytes(1000))
    return folder


@pytest.fixture
def server(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub of our own, and an empty cache."""
    with serving(folder) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(hub, "FIRST_BYTES", 4096)  # of shards so small, 100 kB would be a good part
        monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)  # between attempts
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        yield server
