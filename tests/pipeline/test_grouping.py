"""Images drawn together: the same as those drawn alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from budgeted import difference, free, tight
from marking import always
from torch import Tensor

from zimage_lite.config import GenerateOptions
from zimage_lite.pipeline import denoise, grouping
from zimage_lite.pipeline import weights as loading
from zimage_lite.pipeline.encode import Encode
from zimage_lite.plan import prediction

pytestmark = pytest.mark.slow  # pictures, drawn again and again

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


@pytest.mark.parametrize("per_round", always(2, of=[1, 2, 64]))
@pytest.mark.parametrize("budget", ["resident", "streaming"])
def test_images_drawn_together_are_those_drawn_alone(
    budget: str, per_round: int, tiny: Path, exact, alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tight(tiny) if budget == "streaming" else free(tiny)
    monkeypatch.setattr(grouping, "MOST_PER_ROUND", per_round)
    monkeypatch.setattr(grouping, "RELOADING_SHARE", 1e-9)  # as large as they may be
    reads, encoded, steps = Counter[str](), list[int](), list[int]()
    jobs, encode = loading.Weights._jobs, Encode.run

    def counting_jobs(weights: loading.Weights, name: str, buffer: Tensor) -> Any:
        reads[name] += weights.plan.phase == "denoise"
        return jobs(weights, name, buffer)

    def counting_encode(self: Encode, prompts: Any, *rest: Any) -> Any:
        encoded.append(len(prompts))
        return encode(self, prompts, *rest)

    monkeypatch.setattr(loading.Weights, "_jobs", counting_jobs)
    monkeypatch.setattr(Encode, "run", counting_encode)
    total = sum(own.complete(request).step_count for request in WANTED)
    done = [0]

    def progress(phase: str, count: int, _: int) -> None:
        if phase == "denoise":
            done[0] = count

    found = {}
    for index, image in own.images(WANTED, progress):
        assert index not in found
        found[index] = image
        steps.append(done[0])
    # Prompts are encoded together, which on some processors rounds otherwise (MKL on those with AVX2 alone).
    assert all(difference(found[index], image) <= 1 for index, image in enumerate(alone))
    assert encoded == [5]
    # Five groups, of 4, 2, 1, 2 and 1 images, each handed over round by round.
    sizes = Counter((r.size, r.steps, r.shift, bool(r.guidance)) for r in WANTED).values()
    rounds = sum(-(-size // per_round) for size in sizes)
    assert len(set(steps)) == rounds and steps[0] < total == steps[-1]
    once = {name: count for name, count in reads.items() if name.startswith("context_refiner")}
    again = {name: count for name, count in reads.items() if name.startswith(("noise_refiner", "layers"))}
    assert set(once.values()) == {rounds} and len(once) == 2
    assert set(again.values()) == {total if budget == "streaming" else rounds} and len(again) == 5


@pytest.mark.parametrize("way", always(2, of=[2, 4]))
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
