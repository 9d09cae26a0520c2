"""What the peers are asked for in tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from harness import Work

from zimage_lite.bench.tiers import TIERS

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"
WORK = Work(size=64, steps=4, repeats=2, threads=2)
TIER = TIERS["6gb"]
needs_posix = pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs wait4")
