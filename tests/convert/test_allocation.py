"""Formats by what they cost and gain: against the best of all combinations, and as a file."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.checkpoint.model_card import DEMO, model_folder
from zimage_lite.cli import run
from zimage_lite.convert.allocation import Choice, allocate, allocated
from zimage_lite.convert.recipe import Goal, target
from zimage_lite.convert.streaming import Options
from zimage_lite.errors import UserError


def offered(seed: int) -> dict[str, list[Choice]]:
    """Five tensors of many sizes, whose errors fall by about four for each bit."""
    rng, found = np.random.default_rng(seed), {}
    for name in "abcde":
        size, level = int(rng.integers(100, 1000)), rng.random() * 10
        bits = enumerate((2, 3, 4, 6))
        found[name] = [Choice(f"f{i}", size * b, float(level * 4.0**-b * (0.5 + rng.random()))) for i, b in bits]
    return found


@pytest.mark.parametrize("seed", range(8))
def test_allocation_is_nearly_the_best(seed: int) -> None:
    """But for the bytes that are left over in the end, which a dearer step somewhere else may use better."""
    own = offered(seed)
    budget = int(0.6 * sum(choices[-1].nbytes for choices in own.values()))
    chosen = allocate(own, budget)
    taken = sum(choice.nbytes for choice in chosen.values())
    assert chosen.keys() == own.keys() and taken <= budget
    found = sum(choice.error for choice in chosen.values())
    mixes = [mix for mix in product(*own.values()) if sum(choice.nbytes for choice in mix) <= budget]
    best = min(sum(choice.error for choice in mix) for mix in mixes)
    dearest = max(choices[0].error for choices in own.values())
    assert best <= found <= best + 0.2 * dearest
    assert allocate(dict(reversed(own.items())), budget) == chosen


@pytest.mark.parametrize(("text", "nbytes"), [("4.5bpw", 5625), ("4bpw", 5000), ("3MB", 3_000_000)])
def test_goals(text: str, nbytes: int) -> None:
    assert target(f"auto:{text}").goal == Goal.of(text)
    assert Goal.of(text).bytes_of(10_000) == nbytes


@pytest.mark.parametrize("text", ["auto:many", "auto:xbpw", "auto:"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        target(text)


@pytest.mark.slow
def test_it_says_how_far_measuring_has_come() -> None:
    source, seen = open_checkpoint(model_folder(DEMO) / "transformer"), list[tuple[int, int]]()
    allocated(target("auto:8bpw"), source, Options(effort="fast"), lambda *at: seen.append(at))
    done, totals = zip(*seen, strict=True)
    assert len(seen) > 20 and list(done) == sorted(set(done)) and set(totals) == {done[-1]}


@pytest.mark.slow
def test_a_file_of_the_size_that_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "auto.gguf"
    common = ("--component", "transformer", "-o", str(out), "--keep", "layers.0.attention.*")
    assert run(["quantize", "demo", "--to", "auto:8bpw", *common]) == 0
    written = open_checkpoint(out)
    weights = sum(int(np.prod(tensor.shape)) for tensor in written.tensors.values())
    assert 7.5 < 8 * written.nbytes / weights <= 8
    assert written.tensors["layers.0.attention.to_q.weight"].format.name == "bf16"
    assert len({tensor.format.name for tensor in written.tensors.values()}) > 3
    capsys.readouterr()
    assert run(["inspect", str(out)]) == 0
    assert "made by the recipe auto-8bpw layers.0.attention.*=keep" in capsys.readouterr().out


def test_what_is_too_small_is_refused_before_it_is_measured(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest that is told is refused no more, and a hundredth of a bit less still is."""
    monkeypatch.setattr("zimage_lite.convert.allocation.choices", lambda *given, **more: pytest.fail("it measures"))
    out = ("--component", "transformer", "-o", tmp_path / "x.gguf")
    line = refused("quantize", "demo", "--to", "auto:3bpw", *out)
    told = re.search(r"auto-3bpw: too small for this model: expected ([\d.]+)bpw", line)
    assert told
    assert "too small" in refused("quantize", "demo", "--to", f"auto:{float(told[1]) - 0.01:.2f}bpw", *out)
    with pytest.raises(pytest.fail.Exception, match="it measures"):
        run(["quantize", "demo", "--to", f"auto:{float(told[1]) + 0.01:.2f}bpw", *map(str, out)])
    assert not list(tmp_path.iterdir())
