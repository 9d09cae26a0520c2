"""Unpacking on the device: every ggml type against gguf-py, every other format against its codec.

Where there is no gguf-py, as on a bare machine with a GPU, against our codecs, which tests/quant holds to it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from activations import DEVICE, assert_same_codes, poisoned  # noqa: F401
from torch import Tensor
from zimage_kernels import dequantize, hadamard_rotate, requantize
from zimage_kernels.dequantize import KINDS
from zimage_kernels.quantize import Int8Rows, quantize_rows
from zimage_kernels.unpack_ggml import GGML_BLOCKS

from zimage_lite.quant.bnb import read_state
from zimage_lite.quant.formats import FORMATS, GGML_TYPES
from zimage_lite.quant.kquants import PACK as K_QUANTS

pytest.importorskip("triton")

# Where the float16 numbers of a block are; all its other bytes may hold anything.
HALVES = {
    "q8_0": (0,), "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "iq4_nl": (0,), "q2_k": (80, 82),
    "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "iq4_xs": (0,),
}  # fmt: skip
OTHERS = [kind for kind in KINDS if kind not in GGML_BLOCKS]


def _random_blocks(kind: str, rows: int, columns: int) -> Tensor:
    """Every bit pattern of codes and scales, and float16 numbers of either sign."""
    elements, size = GGML_BLOCKS[kind]
    blocks = torch.randint(0, 256, (rows, columns // elements, size), dtype=torch.uint8)
    for at in HALVES[kind]:
        blocks[..., at : at + 2] = torch.randn(rows, columns // elements, 1).half().view(torch.uint8)
    return blocks.view(rows, -1)


def _unpacked(kind: str, packed: Tensor, columns: int) -> Tensor:
    """-> float32, by gguf-py where it is installed."""
    with suppress(ImportError):
        import gguf

        return torch.from_numpy(gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType(GGML_TYPES[kind][0])))
    return FORMATS[kind].codec.dequantize({"": packed}, columns, {})


def _assert_unpacked(ours: Tensor, truth: Tensor) -> None:
    """The interpreter rounds where gguf-py does. A GPU rounds scale * code - minimum once and not twice, so there a
    float32 may be off by the last bit of the larger term."""
    if DEVICE == "cpu":
        assert torch.equal(ours, truth)
    else:
        torch.testing.assert_close(ours, truth, rtol=0, atol=truth.abs().max().item() * 2.0**-22)


@pytest.mark.slow
@pytest.mark.parametrize("kind", GGML_BLOCKS)
def test_ggml_blocks_are_gguf_pys(kind: str) -> None:
    """Rows of whole super-blocks, and for blocks of 32 a row that ends inside the last 256."""
    results: tuple[list[Int8Rows], list[Int8Rows]] = ([], [])
    for rows, columns in ((1, 256), (17, 3840), (3, 96)):
        if columns % GGML_BLOCKS[kind][0]:
            continue
        packed = _random_blocks(kind, rows, columns)
        truth = _unpacked(kind, packed.cpu(), columns).to(DEVICE)
        out = torch.empty(rows, columns)
        dequantize(kind, {"": packed}, {}, out)
        _assert_unpacked(out, truth)

        half = torch.empty(rows, columns, dtype=torch.float16)
        dequantize(kind, {"": packed}, {}, half)
        torch.testing.assert_close(half, truth.half(), rtol=0 if DEVICE == "cpu" else 2.0**-10, atol=0)

        group = 256 if columns % 256 == 0 else 16
        codes = Int8Rows.empty(rows, columns, out.device)
        requantize(kind, {"": packed}, {}, codes, group)
        results[0].append(codes)
        results[1].append(quantize_rows(truth, group, "reference"))
    assert_same_codes(*results)


def test_blocks_have_the_sizes_of_the_table() -> None:
    assert all(GGML_TYPES[kind][1:] == sizes for kind, sizes in GGML_BLOCKS.items())
    assert set(K_QUANTS) <= set(GGML_BLOCKS)


def test_every_integer_format_that_is_written_can_be_unpacked_here() -> None:
    """int8 needs no unpacking; 8-bit floats are left to torch."""
    lossy = {name for name, row in FORMATS.items() if row.writable and row.lossy}
    assert lossy - set(KINDS) == {"int8", "fp8", "f8_e4m3", "f8_e5m2", "qfloat8"}


def _packed(kind: str, rows: int, columns: int) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
    """Parts, options and what the codec unpacks. quanto's scales as float16: the interpreter truncates to bfloat16."""
    codec = FORMATS[kind].codec
    options = dict(codec.options(columns))
    if "quanto" in type(codec).__module__:
        options["dtype"] = "F16"
    if kind == "convrot_w4a4":  # nothing here writes it
        parts = {"": torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8), "_scale": torch.rand(rows, 1)}
    else:
        parts = codec.quantize(torch.randn(rows, columns) * 0.02, options)
    if kind in ("nf4", "fp4"):
        state = parts[codec.state_part]  # type: ignore[attr-defined]
        options |= read_state(bytes(state.tolist()), kind)
    return parts, options, codec.dequantize(parts, columns, options)[:rows]


@pytest.mark.parametrize("kind", OTHERS)
def test_other_formats_are_their_codecs(kind: str) -> None:
    """Rotated formats sum 256 terms in another order, hence the tolerance of a few float32 roundings."""
    results: tuple[list[Int8Rows], list[Int8Rows]] = ([], [])
    for rows, columns in ((1, 256), (17, 3840)):
        parts, options, truth = _packed(kind, rows, columns)
        out, codes = torch.empty(rows, columns), Int8Rows.empty(rows, columns, truth.device)
        dequantize(kind, parts, options, out)
        requantize(kind, parts, options, codes, 256)
        atol = truth.abs().max().item() * 2.0**-20
        if "group" in options and "quanto" not in type(FORMATS[kind].codec).__module__:
            torch.testing.assert_close(out, truth, rtol=0, atol=atol)
            back = hadamard_rotate(codes.codes * codes.scale.unsqueeze(1), 256)
            torch.testing.assert_close(back, truth, rtol=0, atol=atol)  # nothing is lost on the way to int8
        else:
            torch.testing.assert_close(out, truth, rtol=0, atol=0 if DEVICE == "cpu" else atol)
            results[0].append(codes)
            results[1].append(quantize_rows(truth, 256, "reference"))
    if results[0]:
        assert_same_codes(*results)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["q4_k", "int4", "nf4", "qint4", "qint8"])
def test_a_weight_may_start_inside_its_parts(kind: str) -> None:
    """As k does in a fused qkv."""
    parts, options, truth = _packed(kind, 6, 256)
    out = torch.empty(2, 256)
    dequantize(kind, parts, options, out, first_row=3)
    torch.testing.assert_close(out, truth[3:5], rtol=0, atol=1e-6)


def test_int4_takes_any_scale_and_no_codebook() -> None:
    """Every e4m3 number there is: subnormal, negative, and so large that the levels are clamped at 127."""
    parts, options, _ = _packed("int4", 16, 256)
    del parts["_codebook"]
    scales = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scales[scales & 127 == 127] = 0  # NaN
    parts["_s_rel"] = scales.view(torch.float8_e4m3fn)
    out = torch.empty(16, 256)
    dequantize("int4", parts, options, out)
    truth = FORMATS["int4"].codec.dequantize(parts, 256, options)
    torch.testing.assert_close(out, truth, rtol=0, atol=truth.abs().max().item() * 2.0**-20)


def test_what_only_the_codec_can_unpack_is_refused() -> None:
    out = torch.empty(2, 256)
    with pytest.raises(ValueError, match="got 'fp8'"):
        dequantize("fp8", {"": torch.zeros(2, 256, dtype=torch.uint8)}, {}, out)
    parts, options, _ = _packed("int4", 2, 256)
    with pytest.raises(ValueError, match="int4: got 192 bytes for 256 columns"):
        dequantize("int4", {**parts, "": torch.zeros(2, 192, dtype=torch.int8)}, options, out)
    with pytest.raises(ValueError, match="rotation group of int4: got 64, expected 256"):
        requantize("int4", parts, options, Int8Rows.empty(2, 256, out.device), 64)
    parts, options, _ = _packed("nf4", 2, 256)
    with pytest.raises(ValueError, match="nf4: got 512 columns to a scale"):
        dequantize("nf4", parts, {**options, "blocksize": 512}, out)
