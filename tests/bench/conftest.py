"""Benchmarks are tested as on a machine without a GPU."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
