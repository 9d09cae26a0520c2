"""What the tests of budgets and of failures share."""

from __future__ import annotations

import pytest

from zimage_lite.memory import hardware
from zimage_lite.plan import prediction, vae_phases


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the process took nothing, so that budgets can be named to the byte; and images are denoised one by one, so
    that they do not differ by rounding."""
    monkeypatch.setattr(hardware, "rss_bytes", lambda: 0)
    monkeypatch.setattr(hardware, "ALLOCATOR_SLACK_BYTES", 0)
    monkeypatch.setattr(prediction, "holes", lambda *_: {})
    monkeypatch.setattr(vae_phases, "holes_of_maps", lambda _: {})
    monkeypatch.setattr(prediction, "_BATCHES", (1,))
