"""Models to compare, without a network that would be fetched."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from zimage_lite.checkpoint.model_card import DEMO
from zimage_lite.cli import run


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo in q8_0 and in q4_0, and the q4_0 transformer alone."""
    folder = tmp_path_factory.mktemp("quantized")
    for to in ("q8_0", "q4_0"):
        assert run(["quantize", DEMO, "--to", to, "-o", str(folder / to)]) == 0
    only = next((folder / "q4_0" / "transformer").glob("*.gguf"))
    (folder / "alone.gguf").write_bytes(only.read_bytes())
    return folder


@pytest.fixture(autouse=True)
def _without_lpips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not it is installed: its network would be fetched."""
    monkeypatch.setitem(sys.modules, "lpips", None)
