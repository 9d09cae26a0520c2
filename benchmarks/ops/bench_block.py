"""A block of the true model at 1024x1024, in 8 and in 16 bits, by our kernels and by eager torch.

    python benchmarks/ops/bench_block.py [--out benchmarks/results/NAME.json]

4096 tokens of the image and 128 of the caption, the same weights in all ways. Eager torch in 8 bits quantizes each row
without a rotation, or with one as a dense 256 x 256 product in bf16, then torch._int_mm, and attends in 16 bits; in 16
bits it is our references. IN_A_ROW blocks in a row are timed, as they come in a model, without CUDA graphs.

of_limit: the time of the products alone at the ceilings of the same run (a matmul of 8192^3 in int8 and in bf16) over
the time; linears and queries x keys in 8 bits where the way has them so, weights x values in 16. activation_bytes: a
count, see `traffic`; weights come on top. work_bytes: the peak of what is allocated beside weights and input.
relative_error: of what the block adds, against float32; ours may have twice that of the references in as many bits,
else the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_linear_int8 import ceilings
from eager import replace_linears
from full_width import (
    CAPTION_TOKENS,
    CONFIG,
    DEVICE,
    DTYPE,
    IMAGE_TOKENS,
    OURS,
    OURS16,
    Weights,
    cpu_ms,
    limit_ms,
    memory,
    per_call,
    random_weights,
    relative_error,
    unpacked,
    weight_tensors,
)
from timing import need_cuda, report, spread
from torch import Tensor
from traffic import Traffic

from zimage_lite.model import compute, linear, transformer
from zimage_lite.model.compute import Compute
from zimage_lite.model.linear import bind
from zimage_lite.model.rope import grid_positions, rope_angles
from zimage_lite.model.transformer import Block

IN_A_ROW = 8
EAGER16 = "16-bit, eager torch"
KERNELS = {
    transformer: ("add_norm", "swiglu_int8"),
    compute: ("attention_int8", "flash_attention", "norm_rope", "quantize_rows"),
    linear: ("linear_int8",),
}


class Way(NamedTuple):
    """linears8, attention8: which of its products are in 8 bits."""

    name: str
    block: Block
    compute: Compute
    linears8: bool = False
    attention8: bool = False


def ways(weights: Weights) -> list[Way]:
    half = unpacked(weights, DTYPE)
    plain, turned = (bound(half, DTYPE) for _ in range(2))
    replace_linears(plain, rotate=False)
    replace_linears(turned, rotate=True)
    return [
        Way(OURS, bound(weights, DTYPE), Compute("triton", int8=True), True, True),
        Way(OURS16, bound(half, DTYPE), Compute("triton")),
        Way("int8, eager torch, no rotation", plain, Compute(), True),
        Way("int8, eager torch, dense rotation", turned, Compute(), True),
        Way(EAGER16, bound(half, DTYPE), Compute()),
    ]


def bound(weights: Weights, dtype: torch.dtype) -> Block:
    block = Block(CONFIG, modulated=False)  # what the time does comes from outside
    bind(block, weights, dtype)
    return block


def calls_of(x: Tensor) -> Callable[[Way], Callable[[], Tensor]]:
    tokens = len(x)
    cos, sin = rope_angles(grid_positions((tokens, 1, 1), (0, 0, 0)), CONFIG.axes_dims, CONFIG.rope_theta)
    rope = cos.to(x.device), sin.to(x.device)
    centre = torch.tensor([[1.0], [0.0], [1.0], [0.0]], device=x.device)
    vectors = centre + 0.3 * torch.randn(4, CONFIG.dim, device=x.device)

    def call_of(way: Way) -> Callable[[], Tensor]:
        dtype = way.block.attention_norm1.weight.dtype
        given = x.to(dtype), rope, [tokens], vectors.to(dtype), way.compute
        return lambda: way.block(*given)

    return call_of


def blocks(rates: dict[str, Any]) -> Iterator[dict[str, Any]]:
    weights, x = random_weights(Block(CONFIG, modulated=False)), torch.randn(IMAGE_TOKENS + CAPTION_TOKENS, CONFIG.dim)
    x[:, 5] *= 30
    x = x.to(DEVICE, DTYPE)
    call_of, all_ways = calls_of(x), ways(weights)
    exact = Way("float32", bound(unpacked(weights, torch.float32), torch.float32), Compute())
    truth = call_of(exact)() - x.float()

    def error(way: Way) -> float:
        return relative_error(call_of(way)().float() - x.float(), truth)

    errors = {way.name: error(way) for way in all_ways}
    reference = all_ways[0]._replace(compute=Compute(int8=True))
    allowed = {OURS: 2 * error(reference), OURS16: 2 * errors[EAGER16]}
    del exact
    first_ms = 0.0
    for way in all_ways:
        call = call_of(way)
        times = per_call(call, IN_A_ROW)
        first_ms = first_ms or times[1]
        row = {"op": "block", "way": way.name, "tokens": len(x), **spread(times)}
        limit = limit_ms([len(x)], rates, way.linears8, way.attention8)
        row |= {"times_as_long": times[1] / first_ms, "of_limit": limit / times[1]}
        row |= (
            {"cpu_ms": cpu_ms(call)}
            | memory(call, way.block)
            | {"activation_bytes": traffic(way, call), "relative_error": errors[way.name]}
        )
        if way.name in allowed:
            kept = errors[way.name] <= allowed[way.name]
            row["check"] = "ok" if kept else f"expected an error of at most {allowed[way.name]:.3g}"
        yield row


def traffic(way: Way, call: Callable[[], Any]) -> int:
    counter = Traffic(weight_tensors(way.block))
    with counter, counter.kernels(KERNELS if way.compute.backend == "triton" else {}):
        call()
    return counter.n_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    need_cuda()
    torch.manual_seed(0)

    def rows() -> Iterator[dict[str, Any]]:
        rates = ceilings()
        yield rates
        yield from blocks(rates)

    with torch.inference_mode():
        found = report(rows(), options.out)
    sys.exit(any(row.get("check", "ok") != "ok" for row in found))


if __name__ == "__main__":
    main()
