"""Weights that are multiplied in 16 bits: unpacked by the kernel where it can run, else by their codec."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes, NoLaunch
from oracles import relative_error
from packing import packed_as
from torch import Tensor
from zimage_kernels import KINDS, unpacks
from zimage_kernels._triton import interpreted

from zimage_lite import load, quantize
from zimage_lite.convert.catalog import Part
from zimage_lite.model.compute import Compute
from zimage_lite.model.linear import Linear
from zimage_lite.pipeline.backends import Choice
from zimage_lite.plan.footprint import unpacking_bytes
from zimage_lite.quant import tensor as tensor_module
from zimage_lite.quant.formats import FORMATS
from zimage_lite.quant.tensor import GPU_PIECE_WEIGHTS, TORCH_DTYPES, QTensor

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not interpreted(), reason="kernels on CPU tensors: needs TRITON_INTERPRET=1")

WRITABLE = [kind for kind in KINDS if FORMATS[kind].writable]


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds that the kernel was asked for."""
    asked: list[str] = []
    kernel = tensor_module.dequantize

    def dequantize(kind: str, *args: Any) -> None:
        asked.append(kind)
        kernel(kind, *args)

    monkeypatch.setattr(tensor_module, "dequantize", dequantize)
    return asked


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITABLE)
def test_products_are_those_of_the_codec(name: str, unpacked: list[str]) -> None:
    """Weights are the same to the bit, but for rotated ones: in another order, 8 additions deep, which each may move
    them by half a step of float32; and float16 rounds what that moves."""
    weight, x = packed_as(name, torch.randn(4, 256)), torch.randn(5, 256)
    allowed = {torch.float32: 8 * 2.0**-24, torch.float16: 2.0**-11} if name == "int4" else {}
    for dtype in (torch.float32, torch.float16):
        theirs = weight.linear(x.to(dtype))
        assert not unpacked
        ours = weight.linear(x.to(dtype), "triton")
        assert unpacked == [name] and ours.dtype == dtype
        unpacked.clear()
        assert relative_error(ours, theirs) <= allowed.get(dtype, 0)


@pytest.mark.parametrize(("name", "count"), [("q4_0", 3), ("nf4", 3), ("qint4", 1)])
def test_pieces(name: str, count: int, unpacked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as many rows as a kernel compiled for aligned addresses takes, where the format can be cut."""
    weight, x = packed_as(name, torch.randn(36, 64)), torch.randn(5, 64)
    whole = weight.linear(x)
    monkeypatch.setattr(tensor_module, "CPU_PIECE_WEIGHTS", 20 * 64)
    pieces = weight.linear(x, "triton")
    assert len(unpacked) == count
    assert relative_error(pieces, whole) <= 1e-6  # the matrix product may split its sums differently


def test_a_part_of_a_fused_weight(unpacked: list[str]) -> None:
    """k of a qkv that cannot be cut by rows."""
    whole, x = packed_as("qint4", torch.randn(12, 256)), torch.randn(5, 256)
    k = QTensor(whole.format, (4, 256), whole.parts, whole.options, first_row=4)
    assert torch.equal(k.linear(x, "triton"), k.linear(x)) and len(unpacked) == 1
    torch.testing.assert_close(k.linear(x), whole.linear(x)[:, 4:8])


def test_what_only_a_codec_can_unpack(unpacked: list[str]) -> None:
    """Formats without a kernel, and odd files of formats that have one."""
    x = torch.randn(5, 256)
    for name in ("fp8", "qfloat8", "int8", "bf16"):
        weight = packed_as(name, torch.randn(12, 256))
        assert torch.equal(weight.linear(x, "triton"), weight.linear(x))
    six_bits = packed_as("int4", torch.randn(12, 256))
    six_bits.parts[""] = torch.randint(-128, 128, (12, 192), dtype=torch.int8)
    wide_scales = packed_as("int4", torch.randn(12, 256))
    wide_scales.parts["_s_rel"] = wide_scales.parts["_s_rel"].float()
    across_rows = packed_as("nf4", torch.randn(12, 64))
    weights = (six_bits, wide_scales, across_rows)
    for weight, columns in zip(weights, (256, 256, 96), strict=True):
        assert not unpacks(weight.format.name, weight.parts, weight.options, columns)
    six_bits = QTensor(six_bits.format, six_bits.shape, six_bits.parts, {**six_bits.options, "bits": 6})
    assert torch.equal(six_bits.linear(x, "triton"), six_bits.linear(x))
    assert not unpacked


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", WRITABLE)
@torch.inference_mode()
def test_memory(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a weight as large as w2, on a GPU: the result of a piece, and for a 64th of nf4's weights a few numbers. Never
    more than is planned, which is for the codec."""
    monkeypatch.setattr(importlib.import_module("zimage_kernels.dequantize"), "_dequantize_kernel", NoLaunch())
    rows, columns = 3840, 10240
    chosen, compute = FORMATS[name], {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    options = {**chosen.codec.options(columns), "offset": 0.0}
    with torch.device("meta"):
        layout = chosen.layout(rows, columns, options)
        parts = {suffix: torch.empty(shape, dtype=TORCH_DTYPES[kind]) for suffix, (kind, shape) in layout.items()}
        weight, x = QTensor(chosen, (rows, columns), parts, options), torch.empty(1, columns, dtype=compute)
        with LiveBytes() as live:
            weight.linear(x, "triton")
    piece = compute.itemsize * (GPU_PIECE_WEIGHTS if chosen.row_group else rows * columns)
    assert 0.99 * piece <= live.peak_bytes <= 1.3 * piece  # whole rows, 16 at a time
    assert live.peak_bytes <= unpacking_bytes(Part("", chosen, rows, columns, weight.nbytes), "gpu", dtype)


def test_the_encoder(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every linear of every layer once for a prompt, and the same embedding. Codecs stand in for the kernel, which is
    slow here."""
    unpacked = []

    def by_codec(kind: str, parts: Any, options: Any, out: Tensor, first_row: int) -> None:
        wide = FORMATS[kind].codec.dequantize(parts, out.shape[1], options)
        out.copy_(wide[first_row : first_row + len(out)])
        unpacked.append(kind)

    quantize(tiny, tmp_path / "q8_0", "q8_0")
    plain, ours = (load(tmp_path / "q8_0", device="cpu") for _ in range(2))
    ours.encoding.unpacking = Choice(Compute("triton")).unpacking
    monkeypatch.setattr(tensor_module, "dequantize", by_codec)
    monkeypatch.setattr(tensor_module, "use_triton", lambda backend, device: backend == "auto")
    (embedding,), (expected,) = (pipeline.encode(["a red circle"]) for pipeline in (ours, plain))
    linears = [module for module in ours.encoding.component.model.modules() if isinstance(module, Linear)]
    assert unpacked == ["q8_0"] * len(linears) and len(linears) % 7 == 0
    assert torch.equal(embedding, expected)
