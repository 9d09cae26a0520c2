"""Packed blocks that are int8 while they compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from computing import FULL, packed
from oracles import PROMPT, psnr, relative_error
from packing import packed_as, stored
from torch import Tensor, nn
from zimage_kernels import Backend, hadamard_rotate, quantize_rows_reference
from zimage_kernels._triton import interpreted

from zimage_lite import GenerateOptions, load, quantize
from zimage_lite.convert.synthetic import open_synthetic
from zimage_lite.memory.gpus import find_gpu
from zimage_lite.memory.machine import Machine, machine
from zimage_lite.model.linear import Linear, bind
from zimage_lite.model.transformer import Transformer
from zimage_lite.pipeline.reencoding import ReencodedTensor, Scratch, reencoded, when_read
from zimage_lite.pipeline.weights import Component
from zimage_lite.plan.footprint import is_reencoded, reencoded_bytes
from zimage_lite.plan.job import Job
from zimage_lite.plan.model_sizes import true_model
from zimage_lite.plan.prediction import phases
from zimage_lite.quant.tensor import GPU_PIECE_WEIGHTS

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
    (read,) = when_read({"weight": stored(weight)}).values()
    assert is_reencoded(weight.format) and read.packed_bytes == reencoded_bytes(weight.format, 16, 256)
    place, wide = torch.empty(read.packed_bytes, dtype=torch.uint8), weight.dequantize()
    if backend == "triton":
        int8 = reencoded(weight, place)
    else:
        read.read_to(place)
        int8 = read.packed_in(place)
    assert (int8.format.name, int8.options, int8.shape) == ("int8", {"group": 256}, (16, 256))
    if name == "int4":
        torch.testing.assert_close(int8.dequantize(), wide, rtol=1e-5, atol=1e-5)
        return
    expected = quantize_rows_reference(wide, 256)
    steps = (int8.parts[""].int() - expected.codes.int()).abs()
    assert steps.max() <= 1 and steps.count_nonzero() <= 1  # of 4096; see tests/ops/activations.py
    torch.testing.assert_close(int8.parts["_scale"].squeeze(1), expected.scale, rtol=2**-15, atol=0)


def test_what_kernels_do_not_reencode_is_read_as_it_is() -> None:
    """Blocks of nf4 that run across rows, and what is not made of integers."""
    for weight in (packed_as("nf4", torch.randn(16, 96)), packed(torch.randn(16, 256), "f32")):
        there = stored(weight)
        assert when_read({"weight": there}) == {"weight": there}


def test_a_weight_that_is_read_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zimage_lite.pipeline.reencoding.REENCODED_AT_ONCE", 3 * 256)
    weight = packed(torch.randn(16, 256), "q4_k")
    places = []
    for _ in range(2):
        (read,) = when_read({"weight": stored(weight)}).values()
        places.append(torch.zeros(read.packed_bytes, dtype=torch.uint8))
        read.read_to(places[-1])
        monkeypatch.undo()
    assert torch.equal(*places) and places[0].any()


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
    """From the file to the picture, on the CPU, once for two passes over blocks that stay."""
    given = []

    def counted(tensor: ReencodedTensor, buffer: Tensor) -> None:
        given.append(tensor.stored.name)
        read_to(tensor, buffer)

    quantize(tiny, tmp_path / to, to)
    request = GenerateOptions(PROMPT, 64, 64, steps=2, seed=3)
    plain, ours = (load(tmp_path / to, device="cpu", compute=bits) for bits in ("16bit", "int8"))
    read_to = ReencodedTensor.read_to
    monkeypatch.setattr(ReencodedTensor, "read_to", counted)
    pictures = [pipeline.generate([request])[0] for pipeline in (plain, ours)]
    # Layers, and of their 7 linears not w2, whose rows are 682 long.
    assert len(given) == len(set(given)) == 3 * 6 and ours.computes_with()["compute"] == "int8"
    assert 40 <= psnr(*pictures, 255) < float("inf")


@pytest.mark.parametrize("name", ["q4_k_m", "int4", "nf4", "int8", "fp8"])
def test_the_scratch_is_what_is_planned(name: str) -> None:
    """At full size. A GGUF has float32 norms, of which one is made bfloat16 at a time while the scratch is there."""
    files = open_synthetic(f"synthetic:{name}")
    blocks = ("context_refiner", "noise_refiner", "layers")
    component = Component(Transformer(files.transformer.config), files.transformer, blocks)
    taken = Scratch(component.stored, torch.device("meta")).buffer.nbytes
    (_, (denoise,), _) = phases(true_model(name), Job(1024, 1024), machine(find_gpu("RTX 3060 Laptop"), 16 * 10**9))
    planned = dict(denoise.fixed)["unpacking"]
    assert (taken > 1.7e8) == (name not in ("int8", "fp8"))  # 4 x 3840^2 + 3 x 3840 x 10240 weights
    if taken:
        assert taken + 2 * 3840 * (name == "q4_k_m") == planned
        assert planned > 10 * (GPU_PIECE_WEIGHTS - 10240)  # what unpacking in pieces takes


@pytest.mark.parametrize("name", ["q4_k_m", "int4", "nf4", "int8", "fp8"])
def test_blocks_that_are_int8_once_they_are_read_are_as_planned(name: str) -> None:
    """At full size: never more, and no more than a place of 64 bytes for each tensor less."""
    files = open_synthetic(f"synthetic:{name}")
    blocks = ("context_refiner", "noise_refiner", "layers")
    component = Component(Transformer(files.transformer.config), files.transformer, blocks, reencoded="when read")
    (_, (denoise,), _) = phases(true_model(name), Job(1024, 1024), Machine("a CPU", 16 * 10**9, cpu_int8=True))
    for block in (*denoise.prelude, *denoise.blocks):
        taken, count = component.block_bytes[block.name], len(component.stored[block.name])
        assert 0 <= block.n_bytes - taken <= 64 * 8 * count
