"""Streaming over a real link: on the GPU, against the same model with all weights resident.

benchmarks/streaming_gpu.py does the same at full size."""

from __future__ import annotations

import gc

import pytest
import torch

from zimage_lite.config import GenerateOptions, RuntimeOptions, TextEncoderConfig, TransformerConfig, VaeConfig
from zimage_lite.convert.synthetic import open_synthetic
from zimage_lite.memory.hardware import gpu_here
from zimage_lite.memory.machine import CUDA_CONTEXT_BYTES
from zimage_lite.memory.placement import GRANULE_BYTES
from zimage_lite.pipeline.drawing import Pipeline

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SMALL = (  # 32 blocks of 7 MB in int8
    TransformerConfig(dim=768, n_heads=6, cap_feat_dim=256),
    TextEncoderConfig(
        vocab_size=640, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, intermediate_size=512,
    ),
    VaeConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1),
)  # fmt: skip
REQUEST = GenerateOptions("a cat", 128, 128, steps=3)


def drawn(name: str, vram_bytes: int | None = None) -> tuple[torch.Tensor, Pipeline]:
    options = RuntimeOptions(device="cuda", backend="reference", cache=False, vram_bytes=vram_bytes)
    pipeline = Pipeline(open_synthetic(f"synthetic:{name}", configs=SMALL), options)
    return pipeline.generate([REQUEST])[0], pipeline


def budget_for(resident: Pipeline, blocks: int) -> int:
    """Room for so many of the main blocks, those in slots included."""
    plan = resident.plans["denoise"]
    size = max(-(-n_bytes // GRANULE_BYTES) * GRANULE_BYTES for n_bytes in plan.sizes.values())
    fixed = plan.peak_vram_bytes - sum(-(-n // GRANULE_BYTES) * GRANULE_BYTES for n in plan.sizes.values())
    others = max(other.peak_vram_bytes for phase, other in resident.plans.items() if phase != "denoise")
    return max(fixed + blocks * size, others)


@pytest.mark.parametrize("blocks", [2, 3, 8])
@pytest.mark.parametrize("name", ["int8", "int4", "q4_k_m"])
def test_streamed_equals_resident(name: str, blocks: int) -> None:
    """Bit for bit: the same products of the same bytes, wherever they lay before."""
    whole, resident = drawn(name)
    assert not resident.plans["denoise"].streamed
    image, streamed = drawn(name, budget_for(resident, blocks))
    plan, moved = streamed.plans["denoise"], streamed.meter.phases["denoise"]
    assert plan.streamed and plan.device == "gpu"
    assert moved["copied_bytes"] > 3 * sum(plan.sizes[block] for block in plan.streamed)
    assert moved["pinned_bytes"] > 0
    for phase, other in resident.plans.items():  # else it is not the same computation
        assert (streamed.plans[phase].device, streamed.plans[phase].way) == (other.device, other.way)
    assert torch.equal(image, whole) and image.float().std() > 20


def test_peaks_stay_under_the_plan() -> None:
    """What torch's allocator gives out, and the context that is assumed; and all is given back.

    Not what it takes: from 20 MB on and in steps, which only matters where a model is as small as this one. Nor what
    cuBLAS takes of it once and keeps, 32 MiB on Hopper: the resident run has made it do that."""
    _, resident = drawn("int8")
    gc.collect()
    torch.cuda.empty_cache()
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    _, streamed = drawn("int8", budget_for(resident, 8))
    for phase, plan in streamed.plans.items():
        taken = streamed.meter.phases[phase]["peak_vram_bytes"] - before
        assert taken + CUDA_CONTEXT_BYTES <= plan.peak_vram_bytes, phase
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() == before and torch.cuda.memory_reserved() <= reserved


def test_cpu_and_gpu_draw_the_same() -> None:
    """In float32, where only the order of sums differs: a pixel near the edge between two levels may be one off."""
    images = []
    for device in ("cpu", "cuda"):
        options = RuntimeOptions(device=device, dtype="fp32", backend="reference", cache=False)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            images.append(Pipeline(open_synthetic("synthetic:int8", configs=SMALL), options).generate([REQUEST])[0])
    apart = (images[0].int() - images[1].int()).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() < 0.05


def test_this_gpu_is_known() -> None:
    gpu = gpu_here(torch.device("cuda"))
    assert gpu.capability == torch.cuda.get_device_capability() and gpu.tflops16[1] > 1
