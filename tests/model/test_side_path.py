"""What adapters add to a linear, in every precision that it multiplies in, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from packing import packed_as, rotated
from torch import Tensor
from zimage_kernels import Backend, Int8Rows, quantize_rows

from zimage_lite.adapters.joined import merged
from zimage_lite.model.compute import Compute
from zimage_lite.model.float16 import FEED_FORWARD_SCALE
from zimage_lite.model.linear import Linear, bind
from zimage_lite.model.side_path import SidePath
from zimage_lite.model.transformer import FeedForward

ROWS, TOKENS = 48, 7
FULL, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
EPSILON = {HALF: 2.0**-11, BRAIN: 2.0**-8, FULL: 2.0**-24}  # half a step, relative


def random(*shape: int, scale: float = 0.1) -> Tensor:
    return scale * torch.randn(shape)


def lora(columns: int, rank: int = 16) -> dict:
    return {"a": random(rank, columns), "b": random(ROWS, rank)}


SIDES: dict[str, Callable[[int], SidePath]] = {
    "LoRA": lambda k: SidePath(**lora(k)),
    "DoRA by row": lambda k: SidePath(**lora(k), out_gain=random(ROWS)),
    "gains alone": lambda k: SidePath(out_gain=random(ROWS)),
    "bias": lambda k: SidePath(**lora(k), bias=random(ROWS, scale=1.0)),
    "LoKr": lambda k: SidePath(krons=[(random(6, 4), random(8, k // 4)), (random(3, 8), random(16, k // 8))]),
    "LoRA and LoKr": lambda k: SidePath(**lora(k), krons=[(random(6, 4), random(8, k // 4))]),
    "difference": lambda k: SidePath(dense=random(ROWS, k, scale=0.03), bias=random(ROWS)),
    "rotated outputs": lambda k: SidePath(**lora(k), out_blocks=[random(6, 8, 8)], out_gain=random(ROWS)),
    "rotated inputs": lambda k: SidePath(**lora(k), in_blocks=[random(k // 8, 8, 8)], bias=random(ROWS)),
    "DoRA by column": lambda k: SidePath(**lora(k), in_gain=random(k)),
}
OF_INPUTS = ("rotated inputs", "DoRA by column")


def in_dtype(side: SidePath, dtype: torch.dtype) -> SidePath:
    """Another one, its matrices as they are computed with."""
    one = {name: getattr(side, name) for name in ("a", "b", "dense")}
    several = {name: getattr(side, name) for name in ("in_blocks", "out_blocks")}
    return SidePath(
        **{name: None if own is None else own.to(dtype, copy=True) for name, own in one.items()},
        **{name: [blocks.to(dtype) for blocks in own] for name, own in several.items()},
        krons=[(w1.to(dtype), w2.to(dtype)) for w1, w2 in side.krons],
        in_gain=side.in_gain,
        out_gain=side.out_gain,
        bias=side.bias,
    )


def linear_of(columns: int, name: str, dtype: torch.dtype, rows: int = ROWS) -> Linear:
    made = Linear(columns, rows)
    bind(made, {"weight": packed_as(name, random(rows, columns))}, dtype)
    return made


def truth(linear: Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """What should come out, and what of it the side path has changed. x: [tokens, columns] float64. Asked before the
    linear is, which turns A in place."""
    assert linear.packed is not None and linear.side is not None
    weight, bias = linear.packed.dequantize(), linear.side.bias
    changed = merged(weight, in_dtype(linear.side, FULL)).double()
    y = x @ changed.T + (0 if bias is None else bias.double())
    return y, y - x @ weight.double().T


def input_of(x: Int8Rows, group: int) -> Tensor:
    """What such codes stand for, float64."""
    wide = x.codes.double() * x.scale.double()[:, None]
    return torch.from_numpy(rotated(wide.numpy(), group))


def rows_of(x: Tensor, linear: Linear) -> tuple[Int8Rows, Tensor]:
    """x as the linear takes it, and what that is."""
    assert linear.group is not None
    codes = quantize_rows(x, linear.group, "reference")
    return codes, input_of(codes, linear.group)


def assert_near(y: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """A dozen roundings: of x, of A turned and not, of x A, of each sum; the terms are at most as large as the sum's
    norm times two."""
    assert y.dtype == dtype
    assert (y.double() - wanted).norm() <= 6 * EPSILON[dtype] * wanted.norm()


@pytest.mark.parametrize("columns", [512, 64, 80])  # rotated by 256, 64, 16
@pytest.mark.parametrize("name", [name for name in SIDES if name not in OF_INPUTS])
def test_int8_rows_in_float32(name: str, columns: int) -> None:
    linear = linear_of(columns, "int8", FULL)
    x, exact = rows_of(torch.randn(TOKENS, columns), linear)
    before = linear(x).double()
    linear.side = SIDES[name](columns)
    wanted, change = truth(linear, exact)
    y = linear(x)
    assert (y.double() - before - change).norm() <= 1e-5 * change.norm()
    assert torch.equal(linear(x), y)  # what the first time has turned in place serves the second
    assert (linear(exact.float()).double() - wanted).norm() <= 1e-5 * change.norm()  # and is turned back


@pytest.mark.parametrize("name", OF_INPUTS)
def test_what_changes_inputs_takes_no_int8_rows(name: str) -> None:
    linear = linear_of(512, "int8", FULL)
    assert Compute(int8=True).group(linear) == 256
    linear.side = SIDES[name](512)
    assert Compute(int8=True).group(linear) is None
    x = torch.randn(TOKENS, 512)
    wanted, change = truth(linear, x.double())
    assert (linear(x).double() - wanted).norm() <= 1e-5 * change.norm()


@pytest.mark.parametrize("scale_log2", [0, -4])
@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("weight_format", ["bf16", "q8_0", "int8"])
@pytest.mark.parametrize("name", SIDES)
def test_16_bit_inputs(name: str, weight_format: str, dtype: torch.dtype, scale_log2: int) -> None:
    linear, x = linear_of(512, weight_format, dtype), torch.randn(TOKENS, 512).to(dtype)
    linear.side = in_dtype(SIDES[name](512), dtype)
    wanted, _ = truth(linear, x.double())
    assert_near(linear(x, scale_log2), wanted * 2.0**scale_log2, dtype)


@pytest.mark.parametrize("out_dtype", [HALF, BRAIN])
@pytest.mark.parametrize("scale_log2", [0, -4])
@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("name", [name for name in SIDES if name not in OF_INPUTS])
def test_int8_rows_in_16_bits(name: str, dtype: torch.dtype, scale_log2: int, out_dtype: torch.dtype) -> None:
    """out_dtype: values may be wanted in float16, whatever is computed in."""
    linear = linear_of(512, "int8", dtype)
    linear.side = in_dtype(SIDES[name](512), dtype)
    x, exact = rows_of(torch.randn(TOKENS, 512), linear)
    wanted, _ = truth(linear, exact)
    y = linear(x, scale_log2, out_dtype=out_dtype)
    assert y.dtype == out_dtype
    coarse = max(dtype, out_dtype, key=EPSILON.__getitem__)
    assert_near(y.to(coarse), wanted * 2.0**scale_log2, coarse)


@pytest.mark.parametrize("name", ["LoRA", "DoRA by row", "gains alone", "bias", "LoKr"])
def test_int8_rows_by_triton(name: str) -> None:
    pytest.importorskip("triton")
    linear = linear_of(256, "int8", HALF)  # the interpreter truncates to bfloat16
    linear.side = in_dtype(SIDES[name](256), HALF)
    x, exact = rows_of(torch.randn(TOKENS, 256), linear)
    wanted, _ = truth(linear, exact)
    assert_near(linear(x, backend="triton"), wanted, HALF)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    "names",
    [("LoRA", None), ("LoRA", "DoRA by row"), (None, "gains alone"), ("LoKr", "LoRA"), ("LoRA", "bias")],
)
def test_feed_forward_of_int8_rows(names: tuple[str | None, str | None], backend: Backend) -> None:
    """Both factors of SwiGLU in one product, or in two where one of them has more than fits its epilogue."""
    pytest.importorskip("triton")
    layer, compute = FeedForward(256, ROWS), Compute(backend, int8=True)
    for own, name in zip((layer.w1, layer.w3), names, strict=True):
        bind(own, {"weight": packed_as("int8", random(ROWS, 256))}, HALF)
        own.side = in_dtype(SIDES[name](256) if name else SidePath(), HALF)
    x, exact = rows_of(torch.randn(TOKENS, 256), layer.w1)
    gate, up = (truth(own, exact)[0] for own in (layer.w1, layer.w3))
    wanted = torch.nn.functional.silu(gate) * up * FEED_FORWARD_SCALE
    assert_near(layer._hidden(x, compute), wanted, HALF)


def test_rows_of_it() -> None:
    for name, make in SIDES.items():
        side, weight = make(64), random(ROWS, 64)
        whole = merged(weight, side)
        some = side.rows(8, 32)
        assert (merged(weight[8:32], some) - whole[8:32]).norm() <= 1e-6 * whole.norm(), name
        assert (some.bias is None) if side.bias is None else torch.equal(some.bias, side.bias[8:32])
