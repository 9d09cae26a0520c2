"""What may go wrong while images are drawn: an interrupt at any moment, memory that runs out, a file that breaks, a
thousand images in one process. Nothing is half-written, nothing stays behind, and the next call works."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from make_checkpoint import SIZES, write_diffusers, write_tokenizer
from PIL import Image
from torch import Tensor

import zimage_lite
from zimage_lite import loading, pipeline, prediction
from zimage_lite.checkpoint.model_files import open_model
from zimage_lite.checkpoint.stored import StoredTensor
from zimage_lite.cli import run
from zimage_lite.config import GenerateOptions, RuntimeOptions, TransformerConfig
from zimage_lite.errors import BudgetError
from zimage_lite.memory import hardware
from zimage_lite.memory.meter import rss_bytes
from zimage_lite.memory.placement import GRANULE_BYTES
from zimage_lite.memory.plan import FILE
from zimage_lite.model.text_encoder import Layer
from zimage_lite.model.transformer import Block
from zimage_lite.pipeline import Pipeline

CAT = GenerateOptions("a cat", 64, 48, steps=2)
OPENING = ("pipeline.py", "loading.py", "denoising.py", "workers.py", "streamer.py", "meter.py", "linear.py")
HERE = str(Path(zimage_lite.__file__).parent)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the process took nothing, so that budgets can be named to the byte; and images are denoised one by one, so
    that they do not differ by rounding."""
    monkeypatch.setattr(hardware, "rss_bytes", lambda: 0)
    monkeypatch.setattr(hardware, "ALLOCATOR_SLACK_BYTES", 0)
    monkeypatch.setattr(prediction, "_BATCHES", (1,))


def free(model: Path, tell: Callable[[str], None] = lambda _: None) -> Pipeline:
    return Pipeline(open_model(model), RuntimeOptions("cpu", ram_bytes=10**9), tell)


def tight(model: Path) -> Pipeline:
    """With a budget too small for the transformer's blocks, which come and go. Needs `exact`."""
    first = free(model)
    first.generate([CAT])
    plan = first.plans["denoise"]
    blocks = sum(-(-size // GRANULE_BYTES) * GRANULE_BYTES for size in plan.sizes.values())
    made = Pipeline(open_model(model), RuntimeOptions("cpu", ram_bytes=plan.peak_ram_bytes - blocks + 2 * GRANULE_BYTES))
    made.generate([CAT])
    assert set(made.plans["denoise"].homes.values()) == {FILE}
    return made


def held_bytes() -> int:
    """Of all tensors that this process can reach, those that only a cycle keeps included."""
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if issubclass(type(tensor), Tensor) and tensor.device.type == "cpu"
    }
    return sum(storages.values())


# Interrupts inside one Python process


def on_timer(draw: Callable[[], object], seconds: float) -> BaseException | None:
    """What a Ctrl-C after so long raises, unless it came too late. The way of a real one: a signal."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        draw()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt as error:
        return error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return None


def at_line(draw: Callable[[], object], number: int) -> tuple[int, BaseException | None]:
    """Lines that open, close and move things: how many ran, and what an interrupt at this one raised. A signal most
    often meets a product instead."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        name = frame.f_code.co_filename
        if not name.startswith(HERE) or not name.endswith(OPENING):
            return None
        if event == "line":
            count += 1
            if count == number:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        draw()
    except KeyboardInterrupt as error:
        return count, error
    finally:
        sys.settrace(before)
    return count, None


def settled(condition: Callable[[], bool]) -> bool:
    """Threads that nobody joined any more end within 20 ms. Loaded machines may take longer."""
    end = time.perf_counter() + 10
    while not condition() and time.perf_counter() < end:
        time.sleep(0.005)
    return condition()


def interrupted_often(tiny: Path, interrupt: Callable[[Callable[[], object], float], Any], moments: int) -> None:
    """interrupt(draw, share of the run). Each time the error is kept until the next one, as an interactive session
    does, and the garbage collector is off: nothing may wait for either."""
    own, rng = tight(tiny), random.Random(5)
    requests = [CAT, GenerateOptions("a dog", 64, 48, steps=2, seed=1)]

    def draw() -> list[Tensor]:
        return own.generate(requests)

    truth = draw()
    gc.collect()
    before, threads, resident, kept, hits = held_bytes(), threading.active_count(), rss_bytes(), None, 0
    gc.disable()
    try:
        for moment in range(moments):
            kept = interrupt(draw, (moment + rng.random()) / moments)
            hits += kept is not None
            assert settled(lambda: threading.active_count() == threads), threading.enumerate()
            assert held_bytes() == before
            assert not torch.is_inference_mode_enabled()
            if moment % 5 == 0 or kept is None:
                assert all(map(torch.equal, draw(), truth))
        assert all(map(torch.equal, draw(), truth))
    finally:
        gc.enable()
    assert hits >= 0.5 * moments  # else this would be no test
    # One arena is 4 MB, and an interrupt that left one behind would show above; this is what torch and the system's
    # allocator keep for themselves.
    assert rss_bytes() - resident < 3e7


def timed(draw: Callable[[], object]) -> float:
    start = time.perf_counter()
    draw()
    return time.perf_counter() - start


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer signals here")
@pytest.mark.parametrize("moments", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_a_signal_at_any_moment(tiny: Path, exact, moments: int) -> None:
    lasting: list[float] = []

    def interrupt(draw: Callable[[], object], share: float) -> BaseException | None:
        if not lasting:
            lasting.append(min(timed(draw) for _ in range(3)))
        return on_timer(draw, max(share * lasting[0], 1e-6))

    interrupted_often(tiny, interrupt, moments)


@pytest.mark.parametrize("moments", [16, pytest.param(400, marks=pytest.mark.slow)])
def test_an_interrupt_at_any_line(tiny: Path, exact, moments: int) -> None:
    total: list[int] = []

    def interrupt(draw: Callable[[], object], share: float) -> BaseException | None:
        if not total:
            total.append(at_line(draw, 0)[0])
            assert total[0] > 1000
        return at_line(draw, int(share * total[0]) + 1)[1]

    interrupted_often(tiny, interrupt, moments)
