"""Memory that runs out while images are drawn: planned again with less, once."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from budgeted import CAT, difference, free, held_bytes
from torch import Tensor

from zimage_lite.checkpoint.stored import StoredTensor
from zimage_lite.config import GenerateOptions
from zimage_lite.model.text_encoder import Layer
from zimage_lite.model.transformer import Block
from zimage_lite.pipeline import decode, denoise
from zimage_lite.pipeline import weights as loading
from zimage_lite.plan import prediction
from zimage_lite.plan import retry as planning
from zimage_lite.plan.retry import Planning

pytestmark = pytest.mark.slow  # pictures, drawn again and again


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


@pytest.fixture(scope="module")
def large_pictures(tiny: Path) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction, "_BATCHES", (1,))
        return free(tiny).generate(THREE)


ALWAYS = {("a layer of the encoder", False), ("bringing a block", False), ("the decoder", False)}
CASES = [
    pytest.param(
        place, later, id=f"{place}, {'later' if later else 'first'}",
        marks=[] if (place, later) in ALWAYS else pytest.mark.full_size,
    )
    for later in (False, True)
    for place in PLACES
]  # fmt: skip


@pytest.mark.parametrize(("place", "later"), CASES)
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
