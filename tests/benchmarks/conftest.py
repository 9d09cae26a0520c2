"""A model that the peers draw from."""

from __future__ import annotations

from pathlib import Path

import pytest

from zimage_lite.convert.quantize import quantize


@pytest.fixture(scope="module")
def q8_0(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers") / "q8_0"
    quantize(tiny, folder, "q8_0")
    return folder
