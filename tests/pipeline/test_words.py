"""What images are told in each step."""

from __future__ import annotations

import pytest
import torch

from zimage_lite.config import GenerateOptions
from zimage_lite.pipeline.levels import is_within
from zimage_lite.pipeline.words import Words, all_words, is_guided, words

GUIDED = GenerateOptions("a", guidance=2.0, negative="b")


def told(request: GenerateOptions, steps: int = 10) -> list[list[Words]]:
    return [words(request, step, steps, 1 - step / steps) for step in range(steps)]


def test_parts_of_steps_are_whole_steps() -> None:
    """Where a product is not quite the number of steps that it stands for: 0.28 * 25 > 7, 0.58 * 50 < 29."""
    for steps, part, count in ((25, 0.28, 7), (25, 0.56, 14), (50, 0.58, 29)):
        before = [step for step in range(steps) if is_within(step, steps, 0.0, part)]
        after = [step for step in range(steps) if is_within(step, steps, part, 1.0)]
        assert before == list(range(count)) and before + after == list(range(steps))


def test_without_guidance_the_prompt_alone() -> None:
    assert told(GenerateOptions("a", negative="b")) == [[Words("a")]] * 10
    assert all_words(GenerateOptions("a", negative="b")) == [Words("a")]


@pytest.mark.parametrize(
    ("change", "guided"),
    [
        ({}, range(10)),
        ({"guidance_range": (0.0, 0.5)}, range(5)),
        ({"guidance_range": (0.25, 0.75)}, range(3, 8)),
        ({"guidance_range": (0.5, 0.5)}, range(0)),
        ({"cfg_truncation": 0.31}, range(4)),  # 1 - sigma is 0, 0.1, 0.2 and 0.3 in the first four
        ({"cfg_truncation": 0.31, "guidance_range": (0.2, 1.0)}, range(2, 4)),
    ],
)
def test_when_guidance_is_on(change, guided) -> None:
    request = GenerateOptions("a", guidance=2.0, negative="b", **change)
    pair = [Words("a"), Words("b")]
    assert told(request) == [pair if step in guided else pair[:1] for step in range(10)]
    assert all_words(request) == pair


def test_one_step_can_be_guided() -> None:
    assert is_guided(GUIDED, 0, 1, 1.0)


def test_the_varied_prompt_lays_out_the_picture() -> None:
    request = GenerateOptions("a", seed=3, variation=20.0, guidance=1.0, negative="b")
    varied = Words("a", 20.0, 3)
    assert [own[0] for own in told(request, 8)] == [varied] * 2 + [Words("a")] * 6  # a fifth, rounded up
    assert all(own[1] == Words("b") for own in told(request, 8))
    assert all_words(request) == [varied, Words("a"), Words("b")]


def test_half_of_the_values_move() -> None:
    embedding = torch.randn(40, 256)
    moves = Words("a", 20.0, 3).told(embedding) - embedding
    assert 0.45 < moves.ne(0).float().mean() < 0.55
    assert 19 < moves.abs().max() <= 20.01 and abs(moves.mean()) < 0.5
    assert torch.equal(Words("a", 20.0, 3).told(embedding), Words("a", 20.0, 3).told(embedding))
    assert not torch.equal(Words("a", 20.0, 4).told(embedding), Words("a", 20.0, 3).told(embedding))
    assert Words("a").told(embedding) is embedding
    assert Words("a", 1.0).told(embedding.bfloat16()).dtype == torch.bfloat16
