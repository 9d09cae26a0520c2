"""One measured case: what is told of it, and what becomes of one that does not fit or breaks."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zimage_lite.bench import case as bench_case
from zimage_lite.bench.case import Case, measured
from zimage_lite.bench.harness import in_process, summary
from zimage_lite.bench.tiers import DONE, FAILED, NO_FIT, OOM, TIERS
from zimage_lite.memory.machine import CUDA_CONTEXT_BYTES

pytestmark = pytest.mark.slow  # a process for each test


def test_case_of_the_demo() -> None:
    found = measured(Case("demo", None, repeats=2, steps=3, device="cpu"))
    assert found["outcome"] == DONE and found["size"] == [64, 64] and found["told"] == []
    assert len(found["runs"]) == 3 and all(len(one["step_seconds"]) == 3 for one in found["runs"])
    cell = summary(found)
    assert set(cell["phases"]) == {"encode", "denoise", "decode"}
    inside = sum(phase["seconds"]["warm"]["min"] for phase in cell["phases"].values())
    assert inside <= cell["seconds"]["warm"]["max"]
    assert cell["step_share_of_limit"] > 0 and cell["phases"]["denoise"]["read_bytes"] > 10**7
    assert json.loads(json.dumps(cell)) == cell


def test_what_does_not_fit_is_a_result() -> None:
    found = measured(Case("demo", None, repeats=1, steps=1, ram_bytes=10**6, device="cpu"))
    assert found["outcome"] == NO_FIT and "the smallest that works" in found["reason"] and found["runs"] == []


def test_running_out_of_memory_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more lines")

    monkeypatch.setattr(bench_case, "_draw", no_more)
    found = measured(Case("demo", None, repeats=1, steps=1, device="cpu"))
    assert (found["outcome"], found["reason"]) == (OOM, "CUDA out of memory. Tried to allocate 2 GiB")


def test_a_case_that_breaks_is_a_result() -> None:
    found = in_process({"model": "/no/such/model", "size": None, "repeats": 1, "steps": 1})
    assert found["outcome"] == FAILED and "/no/such/model" in found["reason"]
    assert in_process({}, limit=0.01) == {"outcome": FAILED, "reason": "took longer than 0.01 s"}


def test_images_of_an_interrupted_case_are_kept() -> None:
    """After the second of very many; the process is ended, or this would wait for it."""
    told: list[int] = []

    def so_far(runs: list[dict[str, Any]]) -> None:
        told.append(len(runs))
        if len(runs) == 2:
            raise KeyboardInterrupt

    case = {"model": "demo", "size": None, "repeats": 10**6, "steps": 1, "device": "cpu"}
    with pytest.raises(KeyboardInterrupt):
        in_process(case, so_far=so_far)
    assert told == [1, 2]

    seen: list[int] = []
    found = in_process(case | {"repeats": 1}, so_far=lambda runs: seen.append(len(runs)))
    assert found["outcome"] == DONE and seen == [1, 2] and len(found["runs"]) == 2


@pytest.mark.parametrize("context", [400_000_000, 700_000_000])
def test_cap_holds_the_whole_process(monkeypatch: pytest.MonkeyPatch, context: int) -> None:
    """The allocator gets what the tier leaves beside the context: beside the assumed one if the real one is smaller,
    since the plan counts with that."""
    caps, total, tier = [], 140 * 2**30, TIERS["6gb"]
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=total))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part, _: caps.append(part * total))
    case = Case("demo", None, 1, 1, vram_bytes=tier.vram_bytes)
    nvml: Any = SimpleNamespace(works=True, used=lambda: 10**9 + context)
    assert bench_case._take_context(case, nvml, before=10**9) == context
    assert caps == [pytest.approx(tier.vram_bytes - max(context, CUDA_CONTEXT_BYTES))]
