"""What may go wrong while images are drawn: an interrupt at any moment, memory that runs out, a file that breaks, a
thousand images in one process. Nothing is half-written, nothing stays behind, and the next call works."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from budgeted import CAT, free, tight
from torch import Tensor

from zimage_lite.checkpoint.stored import StoredTensor
from zimage_lite.config import GenerateOptions
from zimage_lite.memory.meter import rss_bytes

pytestmark = pytest.mark.slow  # pictures, drawn again and again

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
    [("images", "streaming", 60)]
    + [
        pytest.param(call, budget, 1000, marks=pytest.mark.full_size)
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
