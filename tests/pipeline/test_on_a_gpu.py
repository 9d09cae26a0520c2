"""What is drawn, learned and gathered on a GPU, which is pretended here: what lies there never meets what lies on the
CPU, nothing comes out that the CPU would not make, phases stay within their plans, and nobody waits for the GPU but
where that is meant."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from control_files import save_control, tiny_config
from lessons import FEW
from picture_files import smooth
from PIL import Image
from pretended_cuda import pretended_cuda
from torch import Tensor
from trained_loras import save_lora
from zimage_kernels import hadamard_rotate

from zimage_lite import load
from zimage_lite.calibration.statistics import Moments
from zimage_lite.checkpoint.model_files import open_model
from zimage_lite.config import GenerateOptions, Lora
from zimage_lite.memory.plan import CONTEXT
from zimage_lite.pipeline.drawing import Pipeline
from zimage_lite.train.dataset import examples_in
from zimage_lite.train.trainer import Trainer

EXACT = {"cache": False, "dtype": "fp32", "backend": "reference"}
REQUEST = GenerateOptions("a cat", 64, 64, steps=2)


def test_the_pretended_one_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_cuda(monkeypatch) as gpu:
        x = torch.ones(3, 4, device="cuda")
        assert x.device == torch.device("cuda", 0) and gpu.held_bytes == 48 and not gpu.waits
        x[1:].view(-1).mul_(3)
        assert gpu.held_bytes == 48 and x._version == 1
        assert x.sum().item() == 28 and len(gpu.waits) == 1
        y = torch.ones(4, 2).to("cuda").requires_grad_()
        (x @ y).sum().backward()
        assert y.grad is not None and y.grad.device.type == "cuda" and gpu.held_bytes > 48
        with pytest.raises(RuntimeError, match="on cuda:0 and on the CPU"):
            x @ torch.ones(4, 4)
        with pytest.raises(TypeError):
            x.numpy()
        with pytest.raises(ValueError, match="index"):
            torch.cuda.get_per_process_memory_fraction(torch.device("cuda"))
    assert not torch.cuda.is_available() and isinstance(torch.ones(1).to("cpu"), Tensor)


def drawn(model: Path, requests: Sequence[GenerateOptions], device: str) -> tuple[list[Tensor], Pipeline]:
    pipeline = load(model, device=device, **EXACT)  # type: ignore[arg-type]
    return pipeline.generate(requests), pipeline


def compare(model: Path, requests: Sequence[GenerateOptions], monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    expected, _ = drawn(model, requests, "cpu")
    with pretended_cuda(monkeypatch):
        images, pipeline = drawn(model, requests, "cuda")
    assert all(map(torch.equal, images, expected))
    for phase, plan in pipeline.plans.items():
        assert plan.device == "gpu"
        taken = pipeline.meter.phases[phase]["peak_vram_bytes"]
        assert 0 < taken <= plan.peak_vram_bytes - plan.fixed[CONTEXT], phase
    return pipeline


@pytest.mark.slow
def test_the_cpu_draws_the_same(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a LoRA, a ControlNet, guidance and a mask, and with none of them; and enlarged."""
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255
    lora = save_lora(tmp_path / "lora.safetensors", open_model(tiny).transformer.config)
    net = save_control(tmp_path / "net.safetensors", tiny_config())
    everything: dict[str, Any] = {
        "loras": (Lora(str(lora)),), "controls": f"{net}:0.8", "control_image": smooth((64, 64), 0),
        "image": smooth((64, 64), 1), "mask": Image.fromarray(mask), "guidance": 3.0, "negative": "a dog",
    }  # fmt: skip
    compare(tiny, [replace(REQUEST, **everything), REQUEST, replace(REQUEST, steps=1, hires=1.5)], monkeypatch)


@pytest.mark.slow
def test_pictures_beside_the_prompt(omni_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = compare(omni_folder, [replace(REQUEST, references=(smooth((64, 64), 0),))], monkeypatch)
    assert "look" in pipeline.plans


@pytest.mark.slow
def test_a_step_waits_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For whether what came out is finite."""
    waited = []
    with pretended_cuda(monkeypatch) as gpu:
        pipeline = load(tiny, device="cuda", **EXACT)  # type: ignore[arg-type]
        pipeline.generate([replace(REQUEST, steps=3)], on_step=lambda step: waited.append(len(gpu.waits)))
    assert [after - before for before, after in pairwise(waited)] == [1, 1]


def begun(model: Path, lessons: Path, device: str) -> Trainer:
    """Of two pictures at once, one of them preserved."""
    pipeline = load(model, device=device, **EXACT)  # type: ignore[arg-type]
    trainer = Trainer(pipeline, examples_in(lessons, FEW.trigger), FEW, preserved=1)
    trainer.prepare()
    trainer.begin()
    return trainer


@pytest.mark.slow
def test_the_cpu_learns_the_same(pupil: Path, lessons: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are launched for both pictures without waiting for the GPU, and what runs out of memory on the way is done
    again with less, and leaves nothing behind."""
    expected = list(begun(pupil, lessons, "cpu").steps(0, 3))
    with pretended_cuda(monkeypatch) as gpu:
        trainer = begun(pupil, lessons, "cuda")
        before = gpu.taken
        assert list(trainer.steps(0, 3)) == expected
        count = gpu.taken - before
        assert not [wait for wait in gpu.waits if "repeat_interleave" in wait]
        trainer.put_away()

        monkeypatch.setattr("zimage_lite.plan.retry.LESS_AFTER_OOM", 0.999)  # of a plan that is nearly all context
        again = begun(pupil, lessons, "cuda")
        gpu.runs_out_at = gpu.taken + count // 2
        gc.disable()  # what goes, goes by our own doing
        try:
            assert list(again.steps(0, 3)) == expected and gpu.taken > gpu.runs_out_at
            again.put_away()
            assert gpu.held_bytes == 0
        finally:
            gc.enable()


def test_sums_of_statistics_leave_the_gpu_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many pieces an input is cut into."""
    monkeypatch.setattr("zimage_lite.calibration.statistics.PIECE_VALUES", 512)
    x, weights = torch.randn(20, 64), torch.rand(20)
    here, there = (Moments.empty(64, width=16) for _ in range(2))
    here.add(x, 1, weights)
    with pretended_cuda(monkeypatch) as gpu:
        there.add(x.to("cuda"), 1, weights)
        assert len(gpu.waits) == 4  # there the input and its weights, and back the sums
    assert torch.equal(here.squares, there.squares) and torch.equal(here.counts, there.counts)
    assert here.products is not None and there.products is not None and torch.equal(here.products, there.products)


def test_a_rotation_waits_only_the_first_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_cuda(monkeypatch) as gpu:
        x = torch.ones(2, 64, device="cuda")
        hadamard_rotate(x, 16)
        before = len(gpu.waits)
        hadamard_rotate(x, 16)
        assert len(gpu.waits) == before
