"""A model and its conversions, made once for the room."""

from __future__ import annotations

from pathlib import Path

import pytest
from conversions import TARGETS, conversions, write_source


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "small")


@pytest.fixture(scope="session")
def outputs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return conversions(model, TARGETS, tmp_path_factory.mktemp("outputs"))
