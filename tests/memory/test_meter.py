"""The meter: what a phase took."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from zimage_lite.memory.meter import Meter, peak_rss_bytes, rss_bytes


def test_meter() -> None:
    meter, threads = Meter(), threading.active_count()
    with meter.phase("small"):
        time.sleep(0.03)
    with meter.phase("large"):
        held = torch.ones(50_000_000)
        time.sleep(0.1)
        del held
    with pytest.raises(ZeroDivisionError), meter.phase("failed"):
        raise ZeroDivisionError
    assert list(meter.phases) == ["small", "large"]
    small, large = meter.phases.values()
    assert 0.03 <= small["seconds"] < large["seconds"] and large["seconds"] >= 0.1
    assert large["peak_rss_bytes"] - small["peak_rss_bytes"] == pytest.approx(200e6, rel=0.1)
    assert rss_bytes() > 1e7
    assert peak_rss_bytes() >= large["peak_rss_bytes"] - 2e6  # the kernel adds up its threads' pages now and then
    assert threading.active_count() == threads
