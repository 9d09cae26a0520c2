"""How far from the hardware: work by hand and against torch's own counter, limits as measured here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from zimage_lite.api import open_named
from zimage_lite.bench import case as bench_case
from zimage_lite.bench.case import PROMPT
from zimage_lite.bench.ceilings import Ceilings, PhaseWork, measure
from zimage_lite.config import GenerateOptions, RuntimeOptions
from zimage_lite.memory.gpus import find_gpu
from zimage_lite.memory.hardware import machine_here, probe
from zimage_lite.memory.machine import Work, machine
from zimage_lite.memory.plan import Block, Phase
from zimage_lite.pipeline.drawing import Pipeline
from zimage_lite.plan.job import Job
from zimage_lite.plan.model_sizes import true_model
from zimage_lite.plan.prediction import phases


@pytest.mark.parametrize(
    ("int8", "int8_tops", "attention8", "seconds"),
    [
        (True, 100.0, True, 0.01 + 0.01 + 0.02),  # linears and queries x keys at 100, scores x values at 50
        (True, 100.0, False, 0.01 + 0.02 + 0.02),
        (False, 100.0, True, 0.02 + 0.02 + 0.02),
        (True, None, False, 0.02 + 0.02 + 0.02),
    ],
)
def test_least_time(int8: bool, int8_tops: float | None, attention8: bool, seconds: float) -> None:
    """1e12 operations in linears and 2e12 in attention; ceilings of 50 and 100 tera-operations per second."""
    found = Ceilings("bf16", 50.0, int8_tops, attention8).seconds(Work(1e12, 2e12, int8=int8))
    assert found == pytest.approx(seconds)


def test_work_of_a_phase() -> None:
    """Three passes of 5 and 7 operations, after two of 11."""
    blocks = tuple(Block(str(n), 1, Work(float(n))) for n in (5, 7))
    phase = Phase("denoise", blocks, passes=3, prelude=(Block("first", 1, Work(11.0)),), prelude_passes=2)
    work = PhaseWork.of(phase, Ceilings("bf16", 1e-12))
    assert (work.flops, work.pass_flops) == (3 * 12 + 2 * 11, 12)
    assert (work.limit_seconds, work.pass_limit_seconds) == pytest.approx((58, 12))


def test_operations_of_the_true_model() -> None:
    """One step at 1024x1024 with a prompt of 20 tokens, padded to 32, counted by hand: 30 blocks over 4128 tokens and 2
    over the image's 4096; of weights q, k, v and out with 3840 x 3840 each, and w1, w2, w3 with 3840 x 10240."""
    job = Job(1024, 1024, prompt_tokens=(20,))
    denoise = phases(true_model("int8"), job, machine(find_gpu("RTX 4090"), 10**11))[1][0]
    weights = 4 * 3840**2 + 3 * 3840 * 10240
    linear = 2 * weights * (30 * 4128 + 2 * 4096)
    attention = 4 * 3840 * (30 * 4128**2 + 2 * 4096**2)
    assert PhaseWork.of(denoise, Ceilings("bf16", 1.0)).pass_flops == linear + attention


@pytest.mark.slow
def test_operations_against_torchs_counter() -> None:
    """The whole image. Ours leave out embedders, adaLN and the last layer, which together are under 3 % even of a model
    as small as the demo; the counter knows convolutions and products, and is told what attention on a CPU is."""

    def attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    pipeline = Pipeline(open_named("demo", {}), RuntimeOptions("cpu", cache=False))
    request = pipeline.complete(GenerateOptions(PROMPT, 128, 128, steps=4))
    machine_here(pipeline.hardware)  # what it measures, it measures once, and that is not counted
    ops = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=ops) as counter:
        pipeline.generate([request])
    work = bench_case._work(pipeline, request, Ceilings("fp32", 1.0))
    assert set(work) == {"encode", "denoise", "decode"}
    assert sum(one["flops"] for one in work.values()) == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.slow
def test_ceiling_is_a_rate_of_this_device() -> None:
    """More than one core does with scalars, less than any CPU has."""
    found = measure(probe("cpu"))
    assert found.dtype == "fp32" and found.int8_tops is None and 0.001 < found.tflops < 100
