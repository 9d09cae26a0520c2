"""Freed memory goes back to the system, and so the VAE decodes within what the user named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from marking import always

from zimage_lite.memory import heap

pytestmark = pytest.mark.slow  # a process for each test

needs_glibc = pytest.mark.skipif(heap._glibc() is None, reason="glibc 2.33 or newer")

FREED = """
import sys
from contextlib import nullcontext
import torch
from zimage_lite.memory.heap import mapped
from zimage_lite.memory.meter import rss_bytes
torch.ones(7_000_000)  # freed, it raises glibc's threshold to 28 MB
with mapped() if sys.argv[1] == "mapped" else nullcontext():
    pieces = [torch.ones(1_000_000) for _ in range(50)]
    before = rss_bytes()
    del pieces[:-1]  # what stays is the last one, at the end of the heap
    print(before - rss_bytes())
"""

WITHIN = """
import json, sys
from pathlib import Path
import torch
from zimage_lite.checkpoint.model_files import open_model
from zimage_lite.config import RuntimeOptions
from zimage_lite.memory.meter import peak_rss_bytes, rss_bytes
from zimage_lite.pipeline.drawing import Pipeline
pipeline = Pipeline(open_model(Path(sys.argv[1])), RuntimeOptions("cpu", ram_bytes=rss_bytes() + int(sys.argv[2])))
if sys.argv[3] == "decode":
    pipeline.decode([torch.randn(16, 64, 96)])
else:
    pipeline.encode_pictures([torch.randint(256, (512, 768, 3), dtype=torch.uint8)])
plan = pipeline.plans[sys.argv[3]]
print(json.dumps([peak_rss_bytes(), plan.peak_ram_bytes, pipeline.options.ram_bytes, plan.way.rows_per_band]))
"""


def printed(code: str, *args: str) -> Any:
    done = subprocess.run([sys.executable, "-c", code, *args], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


@needs_glibc
def test_freed_pieces_go_back() -> None:
    """49 of 4 MB; where they are not mapped, none of them."""
    assert printed(FREED, "mapped") >= 0.95 * 49 * 4e6
    assert printed(FREED, "kept") <= 0.1 * 49 * 4e6


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_MMAP_THRESHOLD_", "9"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=9")]
)
def test_a_threshold_of_the_user_stays(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    assert not heap._user_has_set_it()
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(heap, "_glibc", lambda: object())  # has no `mallopt`
    with heap.mapped():
        pass


@pytest.mark.parametrize("phase", always("decode", of=["decode", "picture"]))
@pytest.mark.parametrize(
    ("room", "whole"), [pytest.param(600_000_000, True, marks=pytest.mark.full_size), (280_000_000, False)]
)
def test_the_vae_stays_within_what_is_named(room: int, whole: bool, phase: str, diffusers_folder: Path) -> None:
    """768 x 512 in the tiny widths: 252 or 256 MB of maps as a whole."""
    peak, planned, ceiling, rows = printed(WITHIN, str(diffusers_folder), str(room), phase)
    assert (rows == 0) == whole
    assert peak <= planned <= ceiling
