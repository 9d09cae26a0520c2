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
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from make_checkpoint import SIZES, write_diffusers, write_tokenizer
from PIL import Image
from torch import Tensor

import zimage_lite
from zimage_lite.checkpoint.model_files import open_model
from zimage_lite.checkpoint.stored import StoredTensor
from zimage_lite.config import GenerateOptions, RuntimeOptions, TransformerConfig
from zimage_lite.memory import hardware
from zimage_lite.memory.meter import rss_bytes
from zimage_lite.memory.placement import GRANULE_BYTES
from zimage_lite.memory.plan import FILE
from zimage_lite.model.text_encoder import Layer
from zimage_lite.model.transformer import Block
from zimage_lite.pipeline import decode, denoise, grouping
from zimage_lite.pipeline import weights as loading
from zimage_lite.pipeline.drawing import Pipeline
from zimage_lite.plan import prediction
from zimage_lite.plan import retry as planning
from zimage_lite.plan.job import Job
from zimage_lite.plan.prediction import ways_to_denoise
from zimage_lite.plan.retry import Planning

CAT = GenerateOptions("a cat", 64, 48, steps=2)
OPENING = (
    "pipeline.py", "planning.py", "loading.py", "denoising.py", "workers.py", "streamer.py", "meter.py", "linear.py",
)  # fmt: skip
HERE = str(Path(zimage_lite.__file__).parent)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the process took nothing, so that budgets can be named to the byte; and images are denoised one by one, so
    that they do not differ by rounding."""
    monkeypatch.setattr(hardware, "rss_bytes", lambda: 0)
    monkeypatch.setattr(hardware, "ALLOCATOR_SLACK_BYTES", 0)
    monkeypatch.setattr(prediction, "holes", lambda *_: {})
    monkeypatch.setattr(prediction, "holes_of_maps", lambda _: {})
    monkeypatch.setattr(prediction, "_BATCHES", (1,))


def free(model: Path, tell: Callable[[str], None] = lambda _: None) -> Pipeline:
    return Pipeline(open_model(model), RuntimeOptions("cpu", ram_bytes=4 * 10**9), tell)


def tight(model: Path, images: int = 1) -> Pipeline:
    """With a budget too small for the transformer's blocks, which come and go; not for so many latents."""
    first = free(model)
    first.generate([CAT])
    plan = first.plans["denoise"]
    blocks = sum(-(-size // GRANULE_BYTES) * GRANULE_BYTES for size in plan.sizes.values())
    both = [partial(ways_to_denoise, first.sizes, Job(*CAT.size, CAT.steps, images=count)) for count in (1, images)]
    one, all_of_them = (way.plan.peak_ram_bytes for way in first.planning.planned(both))
    budget = plan.peak_ram_bytes - blocks + 2 * GRANULE_BYTES + all_of_them - one
    made = Pipeline(open_model(model), RuntimeOptions("cpu", ram_bytes=budget))
    made.generate([CAT])
    assert images > 1 or set(made.plans["denoise"].homes.values()) == {FILE}
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
    """A transformer of 130 MB, whose blocks are read again and again for a second or two."""
    model = tmp_path_factory.mktemp("larger") / "model"
    model.mkdir()
    config = TransformerConfig(dim=768, n_layers=8, n_refiner_layers=1, n_heads=6, cap_feat_dim=128)
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
@pytest.mark.parametrize("moments", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_ctrl_c_at_any_moment(larger: Path, tmp_path: Path, moments: int) -> None:
    """From the command line's first line to its last: also while torch is being loaded."""
    args = ["cat", "--model", str(larger), "--width", "96", "--height", "96", "--steps", "6", "--json", "-o"]
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


# Memory that runs out


class Failing:
    """Raises `error` in the calls of `owner.name` that are named by number, from 0."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception, *numbers: int) -> None:
        self.calls, original = 0, getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls - 1 in numbers:
                held = torch.ones(10**6)  # what the frames of a traceback would keep
                raise type(error)(*error.args) if len(held) else error
            return original(*args, **kwargs)

        patch.setattr(owner, name, call)


CUDA_ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
CPU_ERROR = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."
)
PLACES: dict[str, tuple[Any, str]] = {  # the first call is the encoder's where it has one, too
    "a layer of the encoder": (Layer, "forward"),
    "the time vectors": (denoise, "schedule"),
    "room for blocks": (loading.Weights, "__init__"),
    "bringing a block": (loading.Weights, "_bind"),
    "a block": (Block, "forward"),
    "the decoder": (decode, "decode_as_planned"),
    "a reader": (StoredTensor, "read_to"),
}
THREE = [GenerateOptions(text, 128, 128, steps=2, seed=seed) for seed, text in enumerate(("a cat", "a dog", "a cat"))]


def difference(image: Tensor, truth: Tensor) -> int:
    """The largest, of uint8."""
    return int((image.int() - truth.int()).abs().max())


@pytest.fixture(scope="module")
def large_pictures(tiny: Path) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction, "_BATCHES", (1,))
        return free(tiny).generate(THREE)


@pytest.mark.parametrize("later", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("place", PLACES)
def test_memory_that_runs_out_once(
    place: str, later: bool, tiny: Path, exact, large_pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = PLACES[place]
    with pytest.MonkeyPatch.context() as patch:
        counted = Failing(patch, owner, name, CPU_ERROR)
        free(tiny).generate(THREE)
    number = int(0.75 * counted.calls) if later else 0
    told: list[str] = []
    own = free(tiny, told.append)
    planned_again, held = Planning.planned_again, list[int]()

    def watched(self: Planning, ways: Any) -> Any:
        held.append(held_bytes())
        return planned_again(self, ways)

    monkeypatch.setattr(Planning, "planned_again", watched)
    failing = Failing(monkeypatch, owner, name, CPU_ERROR if later else CUDA_ERROR, number)
    gc.collect()
    kept = held_bytes()
    gc.disable()
    try:
        found = list(own.images(THREE))
    finally:
        gc.enable()
    assert failing.calls > number and len(told) == 1 and "another program took it" in told[0], told
    assert [index for index, _ in found] == [0, 1, 2]
    for (_, image), truth in zip(found, large_pictures, strict=True):
        # A decoder that takes less adds up in another order: rounding, at most one of 255.
        assert difference(image, truth) <= (1 if place == "the decoder" else 0)
    # Embeddings, latents, time vectors and images: 0.4 MB at most. What blocks lie in has 2 MB or more, and the array
    # in the failing call 4 MB.
    assert held[0] - kept < 10**6


@pytest.mark.parametrize(("place", "numbers"), [("a block", (0, 3)), ("the decoder", (0, 1)), ("a reader", (9, 40))])
def test_memory_that_runs_out_twice(place: str, numbers: tuple[int, int], tiny, exact, refused, monkeypatch, tmp_path):
    owner, name = PLACES[place]
    Failing(monkeypatch, owner, name, MemoryError("no room"), *numbers)
    line = refused(
        "generate", "cat", "--model", tiny, "--device", "cpu", "--width", 128, "--height", 128, "--ram", "1GB",
        "--steps", 3, "-o", tmp_path / "out.png", code=3, notes=1,
    )  # fmt: skip
    assert "memory ran out twice" in line and not list(tmp_path.iterdir())


def test_memory_that_runs_out_where_less_does_not_do(tiny: Path, exact, refused, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(planning, "LESS_AFTER_OOM", 0.1)
    Failing(monkeypatch, Block, "forward", CUDA_ERROR, 2)
    line = refused(
        "generate", "cat", "--model", tiny, "--device", "cpu", "--width", 128, "--height", 128, "--steps", 1,
        "-o", tmp_path / "out.png", code=3,
    )  # fmt: skip
    assert "memory ran out although" in line and "denoise" in line and not list(tmp_path.iterdir())


def test_other_failures_are_no_lack_of_memory(tiny: Path, exact, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come through with their traceback, and nothing is held by it."""
    Failing(monkeypatch, Block, "forward", RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 5)
    own = free(tiny)
    gc.collect()
    before = held_bytes()
    gc.disable()
    try:
        with pytest.raises(RuntimeError, match="mat1") as raised:
            own.generate([CAT])
        assert raised.traceback[-1].name == "call"
        assert held_bytes() - before < 10**6
    finally:
        gc.enable()


# Files that break


def test_a_file_that_is_cut_while_it_is_read(tiny: Path, exact, refused, monkeypatch, tmp_path: Path) -> None:
    budget = tight(tiny).options.ram_bytes
    model, n_read, read_to = tmp_path / "model", 0, StoredTensor.read_to
    shutil.copytree(tiny, model)
    (file,) = (model / "transformer").glob("*.safetensors")

    def cutting(tensor: StoredTensor, buffer: Tensor) -> None:
        nonlocal n_read
        n_read += 1
        if n_read == 150:
            os.truncate(file, file.stat().st_size // 3)
        read_to(tensor, buffer)

    monkeypatch.setattr(StoredTensor, "read_to", cutting)
    threads = threading.active_count()
    line = refused(
        "generate", "cat", "--model", model, "--device", "cpu", "--width", CAT.width, "--height", CAT.height,
        "--steps", 6, "--ram", f"{budget}b", "-o", tmp_path / "out.png",
    )  # fmt: skip
    assert "ends early" in line and str(file) in line
    assert n_read >= 150 and threading.active_count() == threads
    assert not (tmp_path / "out.png").exists()


# Many images


@pytest.mark.parametrize(
    ("call", "budget", "many"),
    [("images", "streaming", 60), ("generate", "resident", 60)]
    + [
        pytest.param(call, budget, 1000, marks=pytest.mark.slow)
        for call in ("images", "generate")
        for budget in ("resident", "streaming")
    ],
)
def test_many_images_take_no_more_memory(tiny: Path, exact, call: str, budget: str, many: int) -> None:
    own = free(tiny) if budget == "resident" else tight(tiny, many if call == "images" else 1)
    threads = threading.active_count()
    requests = [GenerateOptions("a cat", 64, 48, steps=1, seed=seed) for seed in range(many)]

    def drawn() -> Iterator[object]:
        if call == "images":
            yield from own.images(requests)
        else:
            for request in requests:
                yield own.generate([request])

    sizes, begin = [rss_bytes() for _ in drawn()], min(many // 3, 100)
    early, late = max(sizes[begin - 10 : begin + 10]), max(sizes[-20:])
    print(f"{call}, {budget}: {early / 1e6:.1f} MB, then {late / 1e6:.1f} MB: {late / early - 1:+.3%}")
    # 1 % is 3 MB or more: 3 kB for each of 900 images, or 100 kB for each of 30, where a round's blocks take 4 MB.
    assert late < 1.01 * early
    assert budget == "resident" or own.plans["denoise"].streamed
    assert threading.active_count() == threads


# Groups and rounds

WANTED = [
    GenerateOptions("a cat", 64, 48, steps=2),
    GenerateOptions("a dog in the snow", 48, 64, steps=2, seed=1),
    GenerateOptions("a cat", 64, 48, steps=1, seed=2),
    GenerateOptions("a dog in the snow", 64, 48, steps=2, seed=3),
    GenerateOptions("a cat", 64, 48, steps=2, seed=4, guidance=3.0, negative="a dog in the snow"),
    GenerateOptions("", 64, 48, steps=2, seed=5),
    GenerateOptions("a bird", 64, 48, steps=2, seed=6, guidance=2.0, negative="blurred"),
    GenerateOptions("a bird", 64, 48, steps=2, seed=7),
    GenerateOptions("a cat", 64, 48, steps=2, seed=8, shift=5.0),
    GenerateOptions("a cat", 48, 64, steps=2, seed=9),
]


@pytest.fixture(scope="module")
def alone(tiny: Path) -> list[Tensor]:
    """Each image in a call of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction, "_BATCHES", (1,))
        own = free(tiny)
        return [own.generate([request])[0] for request in WANTED]


@pytest.mark.parametrize("per_round", [1, 2, 64])
@pytest.mark.parametrize("budget", ["resident", "streaming"])
def test_images_drawn_together_are_those_drawn_alone(
    budget: str, per_round: int, tiny: Path, exact, alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tight(tiny) if budget == "streaming" else free(tiny)
    monkeypatch.setattr(grouping, "MOST_PER_ROUND", per_round)
    monkeypatch.setattr(grouping, "RELOADING_SHARE", 1e-9)  # as large as they may be
    reads, encoded, steps = Counter[str](), list[int](), list[int]()
    jobs, encode = loading.Weights._jobs, Pipeline._encode

    def counting_jobs(weights: loading.Weights, name: str, buffer: Tensor) -> Any:
        reads[name] += weights.plan.phase == "denoise"
        return jobs(weights, name, buffer)

    def counting_encode(self: Pipeline, prompts: Any, *rest: Any) -> Any:
        encoded.append(len(prompts))
        return encode(self, prompts, *rest)

    monkeypatch.setattr(loading.Weights, "_jobs", counting_jobs)
    monkeypatch.setattr(Pipeline, "_encode", counting_encode)
    total = sum(request.steps for request in WANTED)
    done = [0]

    def progress(phase: str, count: int, _: int) -> None:
        if phase == "denoise":
            done[0] = count

    found = {}
    for index, image in own.images(WANTED, progress):
        assert index not in found
        found[index] = image
        steps.append(done[0])
    assert all(torch.equal(found[index], image) for index, image in enumerate(alone))
    assert encoded == [5]
    # Five groups, of 4, 2, 1, 2 and 1 images, each handed over round by round.
    sizes = Counter((r.size, r.steps, r.shift, r.guidance > 0) for r in WANTED).values()
    rounds = sum(-(-size // per_round) for size in sizes)
    assert len(set(steps)) == rounds and steps[0] < total == steps[-1]
    once = {name: count for name, count in reads.items() if name.startswith("context_refiner")}
    again = {name: count for name, count in reads.items() if name.startswith(("noise_refiner", "layers"))}
    assert set(once.values()) == {rounds} and len(once) == 2
    assert set(again.values()) == {total if budget == "streaming" else rounds} and len(again) == 5


@pytest.mark.parametrize("way", [2, 4])
def test_batches_draw_the_same_images(way: int, tiny: Path, exact, alone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of other shapes add up in another order: rounding, at most one of 255."""
    monkeypatch.setattr(prediction, "_BATCHES", (1, way))
    monkeypatch.setattr(prediction, "_BATCH_CHARGE", 0.01)  # as if they paid
    requests = WANTED * way  # so that each group can be cut into such batches, of different images
    own, ways = free(tiny), list[int]()
    batch_of = denoise.Batch

    def batch(requests: Any, *rest: Any) -> Any:
        ways.append(len(requests))
        return batch_of(requests, *rest)

    monkeypatch.setattr(denoise, "Batch", batch)
    found = own.generate(requests)
    assert set(ways) == {way} and len(ways) == len(WANTED)
    assert all(difference(image, alone[place % len(WANTED)]) <= 1 for place, image in enumerate(found))
