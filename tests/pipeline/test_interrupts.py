"""An interrupt at any moment while images are drawn: it ends, and the next call works."""

from __future__ import annotations

import gc
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from budgeted import CAT, held_bytes, tight
from make_checkpoint import SIZES, write_diffusers, write_tokenizer
from PIL import Image
from torch import Tensor

import zimage_lite
from zimage_lite.config import GenerateOptions, TransformerConfig
from zimage_lite.memory.meter import rss_bytes

pytestmark = pytest.mark.slow  # pictures, drawn again and again

OPENING = (
    "drawing.py", "encode.py", "denoise.py", "decode.py", "workspace.py", "weights.py", "retry.py", "workers.py",
    "streamer.py", "meter.py", "linear.py", "picture.py", "sketch.py", "vae_phase.py", "tasks.py",
)  # fmt: skip
HERE = str(Path(zimage_lite.__file__).parent)


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
    picture = Image.effect_noise((64, 48), 80).convert("RGB")
    requests = [CAT, GenerateOptions("a dog", 64, 48, steps=2, seed=1, image=picture)]

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
@pytest.mark.parametrize("moments", [3, pytest.param(50, marks=pytest.mark.full_size)])
def test_a_signal_at_any_moment(tiny: Path, exact, moments: int) -> None:
    lasting: list[float] = []

    def interrupt(draw: Callable[[], object], share: float) -> BaseException | None:
        if not lasting:
            lasting.append(min(timed(draw) for _ in range(3)))
        return on_timer(draw, max(share * lasting[0], 1e-6))

    interrupted_often(tiny, interrupt, moments)


@pytest.mark.parametrize("moments", [5, pytest.param(400, marks=pytest.mark.full_size)])
def test_an_interrupt_at_any_line(tiny: Path, exact, moments: int) -> None:
    total: list[int] = []

    def interrupt(draw: Callable[[], object], share: float) -> BaseException | None:
        if not total:
            total.append(at_line(draw, 0)[0])
            assert total[0] > 1000
        return at_line(draw, int(share * total[0]) + 1)[1]

    interrupted_often(tiny, interrupt, moments)


# Ctrl-C on the command line

STARTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background may ignore it
from zimage_lite.cli import main
print("started", flush=True)
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer of 120 MB, whose blocks are read again and again for a second."""
    model = tmp_path_factory.mktemp("larger") / "model"
    model.mkdir()
    config = TransformerConfig(dim=512, n_layers=8, n_refiner_layers=1, n_heads=4, cap_feat_dim=128)
    write_diffusers(model, (config, *SIZES["tiny"][1:]), torch.bfloat16, seed=0)
    write_tokenizer(model / "tokenizer", "tiny")
    return model


def drawing(args: list[str], after: float | None = None) -> tuple[int, float, str, str]:
    """A process of its own, which gets Ctrl-C so many seconds after it has begun. -> its exit code, how long it took
    from then (or from its begin) to its end, stderr and stdout."""
    command = [sys.executable, "-c", STARTED, "generate", *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "started\n"
        start = time.perf_counter()
        if after is not None:
            time.sleep(after)
            start = time.perf_counter()
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        return process.returncode, time.perf_counter() - start, err, out


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one process")
@pytest.mark.parametrize("moments", [2, pytest.param(50, marks=pytest.mark.full_size)])
def test_ctrl_c_at_any_moment(larger: Path, tmp_path: Path, moments: int) -> None:
    """From the command line's first line to its last: also while torch is being loaded."""
    args = ["cat", "--model", str(larger), "--width", "96", "--height", "96", "--steps", "4", "--json", "-o"]
    code, _, err, out = drawing([*args, str(tmp_path / "free.png")])
    assert code == 0, err
    planned = json.loads(out)["phases"]["denoise"]["planned"]
    args += [str(tmp_path / "image.png"), "--ram", f"{planned['peak_ram_bytes'] - 60_000_000}b"]
    code, seconds, err, out = drawing(args)
    assert code == 0 and json.loads(out)["phases"]["denoise"]["planned"]["blocks"]["file"] >= 3, err
    truth, rng, codes, longest = (tmp_path / "image.png").read_bytes(), random.Random(7), [], 0.0
    for moment in range(moments):
        folder = tmp_path / str(moment)
        folder.mkdir()
        args[args.index("-o") + 1] = str(folder / "image.png")
        code, lasted, err, _ = drawing(args, (moment + rng.random()) / moments * seconds)
        codes.append(code)
        longest = max(longest, lasted)
        assert code in (0, 130), (moment, code, err)
        assert "Traceback" not in err and "ignored" not in err, err
        left = [path.name for path in folder.iterdir()]
        assert left in ([], ["image.png"]) and (left or code == 130)
        if left:
            assert (folder / "image.png").read_bytes() == truth
            Image.open(folder / "image.png").load()
    assert codes.count(130) >= moments // 2  # else this would be no test
    print(f"longest from Ctrl-C to the end: {longest:.2f} s, of {seconds:.2f} s; {codes.count(0)} were done before")
    if moments > 10:
        assert longest < 2
