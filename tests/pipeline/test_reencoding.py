"""Packed blocks that are int8 while they compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from computing import FULL, packed
from oracles import PROMPT, psnr, relative_error
from torch import nn
from zimage_kernels import Backend, hadamard_rotate, quantize_rows_reference
from zimage_kernels._triton import interpreted

from zimage_lite import GenerateOptions, load, quantize
from zimage_lite.convert.synthetic import open_synthetic
from zimage_lite.memory.gpus import find_gpu
from zimage_lite.memory.machine import Machine, machine
from zimage_lite.model.linear import Linear, bind
from zimage_lite.model.transformer import Transformer
from zimage_lite.pipeline.reencoding import Scratch, reencoded
from zimage_lite.pipeline.weights import Component
from zimage_lite.plan.footprint import is_reencoded, reencoded_bytes
from zimage_lite.plan.job import Job
from zimage_lite.plan.model_sizes import true_model
from zimage_lite.plan.prediction import phases
from zimage_lite.quant.tensor import GPU_PIECE_WEIGHTS, QTensor

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(not interpreted(), reason="kernels on CPU tensors: needs TRITON_INTERPRET=1"),
    pytest.mark.slow,  # whole models in Triton's interpreter
]


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("name", ["int4", "q8_0", "q4_k", "nf4", "qint4", "bnb-int8"])
def test_reencoded_weights(name: str, backend: Backend) -> None:
    """As far from the unpacked weight as 8 bits make it, and int4 not at all: it stands for rotated integers."""
    weight = packed(torch.randn(16, 256), name)
    assert is_reencoded(weight.format)
    place = torch.empty(reencoded_bytes(weight.format, 16, 256), dtype=torch.uint8)
    int8, wide = reencoded(weight, place, backend), weight.dequantize()
    assert (int8.format.name, int8.options, int8.shape) == ("int8", {"group": 256}, (16, 256))
    if name == "int4":
        torch.testing.assert_close(int8.dequantize(), wide, rtol=1e-5, atol=1e-5)
        return
    expected = quantize_rows_reference(wide, 256)
    steps = (int8.parts[""].int() - expected.codes.int()).abs()
    assert steps.max() <= 1 and steps.count_nonzero() <= 1  # of 4096; see tests/ops/activations.py
    torch.testing.assert_close(int8.parts["_scale"].squeeze(1), expected.scale, rtol=2**-15, atol=0)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Linear(256, 8), Linear(256, 8)


def test_blocks_are_int8_while_they_compute_and_packed_again_afterwards() -> None:
    """The second pass over the same blocks, which stay bound, finds what the first one found."""
    weights = [{own: packed(torch.randn(8, 256), "q8_0") for own in ("a.weight", "b.weight")} for _ in range(2)]
    blocks = [Pair(), Pair()]
    for block, own in zip(blocks, weights, strict=True):
        bind(block, own, FULL)
    scratch = Scratch({str(n): own for n, own in enumerate(weights)}, torch.device("cpu"))
    assert scratch.buffer.nbytes == 2 * (8 * 256 + 64)
    for _ in range(2):
        for block, own in zip(scratch.through(iter)(blocks), weights, strict=True):
            for linear, weight in ((block.a, own["a.weight"]), (block.b, own["b.weight"])):
                assert linear.group == 256
                codes, scale = linear.int8_rows
                assert codes.data_ptr() - scratch.buffer.data_ptr() in (0, 8 * 256 + 64)
                wide = hadamard_rotate(codes * scale[:, None], 256)
                assert relative_error(wide, weight.dequantize()) <= 0.01
        assert all(block.a.packed is own["a.weight"] for block, own in zip(blocks, weights, strict=True))
    scratch.end()
    assert not scratch.buffer.nbytes


def test_an_abandoned_pass_does_not_bring_released_weights_back() -> None:
    block = Pair()
    bind(block, {own: packed(torch.randn(8, 256), "q8_0") for own in ("a.weight", "b.weight")}, FULL)
    scratch = Scratch({"0": {"a": block.a.packed, "b": block.b.packed}}, torch.device("cpu"))
    running = iter(scratch.through(iter)([block]))
    next(running)
    block.a.packed = None
    running.close()  # type: ignore[attr-defined]
    assert block.a.packed is None and block.b.packed.format.name == "q8_0"


@pytest.mark.parametrize("to", ["q4_k_m", "nf4", "int4"])
def test_the_pipeline_reencodes(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    """From the file to the picture, on the CPU, in two passes over blocks that stay."""
    given = []

    def counted(weight: QTensor, *args: Any) -> QTensor:
        int8 = reencoded(weight, *args)
        given.append(int8.format.name)
        return int8

    quantize(tiny, tmp_path / to, to)
    request = GenerateOptions(PROMPT, 64, 64, steps=2, seed=3)
    plain, ours = (load(tmp_path / to, device="cpu", compute=bits) for bits in ("16bit", "int8"))
    monkeypatch.setattr("zimage_lite.pipeline.reencoding.reencoded", counted)
    pictures = [pipeline.generate([request])[0] for pipeline in (plain, ours)]
    # Passes, layers, and of their 7 linears not w2, whose rows are 682 long.
    assert given.count("int8") == 2 * 3 * 6 and ours.computes_with()["compute"] == "int8"
    assert 40 <= psnr(*pictures, 255) < float("inf")


@pytest.mark.parametrize("name", ["q4_k_m", "int4", "nf4", "int8", "fp8"])
def test_the_scratch_is_what_is_planned(name: str) -> None:
    """At full size. A GGUF has float32 norms, of which one is made bfloat16 at a time while the scratch is there."""
    files = open_synthetic(f"synthetic:{name}")
    blocks = ("context_refiner", "noise_refiner", "layers")
    component = Component(Transformer(files.transformer.config), files.transformer, blocks, reencoded="triton")
    taken = Scratch(component.weights, torch.device("meta")).buffer.nbytes
    (_, (denoise,), _) = phases(true_model(name), Job(1024, 1024), machine(find_gpu("RTX 3060 Laptop"), 16 * 10**9))
    planned = dict(denoise.fixed)["unpacking"]
    assert (taken > 1.7e8) == (name not in ("int8", "fp8"))  # 4 x 3840^2 + 3 x 3840 x 10240 weights
    if taken:
        assert taken + 2 * 3840 * (name == "q4_k_m") == planned
        assert planned > 10 * (GPU_PIECE_WEIGHTS - 10240)  # what unpacking in pieces takes
    here = Machine("a CPU", 16 * 10**9, cpu_int8=True)
    (_, (denoise,), _) = phases(true_model(name), Job(1024, 1024), here)
    assert taken == dict(denoise.fixed)["re-encoded block"]
