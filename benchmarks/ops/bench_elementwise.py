"""All passes over rows of activations or weights, as a share of the copy bandwidth measured in the same run.

    python benchmarks/ops/bench_elementwise.py [--tokens 1152 4224] [--out benchmarks/results/NAME.json]

Shapes and dtypes are those of the true model at 512x512 and 1024x1024 with a caption of 128 tokens. Bytes: every tensor
that goes in or comes out, once. The copy is a kernel of its own, since torch leaves one to the driver, which may take
another engine. It moves as many bytes, half of them read and half written, and is timed the same way, with a cold L2
cache. `kept`: whether a pass reaches OF_COPY of its bandwidth, or OF_COPY_ROTATING where it rotates. The bars are for
laptops: where memory brings a multiprocessor more than PER_CLOCK bytes a clock, they are shares of that, since
instructions are the limit there and not memory.

What is timed is first compared with the torch reference, weights with their codec, as closely as the self-test does
(`zimage_lite/doctor/selftest`). Exits with 1 if one is wrong.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import zimage_kernels as ops
from timing import Times, cold_milliseconds, need_cuda, report, sets_for, spread
from torch import Tensor
from torch.utils._pytree import tree_leaves
from zimage_kernels import Backend, Branch, Int8Rows, Norm
from zimage_kernels._triton import OPTIONS, cdiv, jit, tl

from zimage_lite.checkpoint.stored import StoredTensor
from zimage_lite.config import TransformerConfig
from zimage_lite.convert.recipe import target
from zimage_lite.convert.synthetic import synthetic_checkpoint
from zimage_lite.doctor.selftest.agreement import first, same_rows, worst
from zimage_lite.doctor.selftest.checks import compute_dtype
from zimage_lite.model.float16 import stream_dtype
from zimage_lite.quant.int8 import rotation_group

DEVICE = "cuda"
OF_COPY, OF_COPY_ROTATING = 0.85, 0.60
PER_CLOCK = 8  # an RTX 3060 Laptop: 336 GB/s for 30 multiprocessors at 1.7 GHz are 6.6; an H100: 11.5
DIM, HIDDEN, HEADS, HEAD_DIM = 3840, 10240, 30, 128
GROUP, HEAD_GROUP, EPS = 256, 64, 1e-5
LONG_COPY_BYTES = 2**31
CHECKED_ROWS = 64  # of a weight: the codecs run on the CPU
WEIGHTS = (("q4_k_s", "w1"), ("q6_k", "w1"), ("q6_k", "w2"), ("q8_0", "w1"), ("int4", "w1"), ("nf4", "w1"))  # --to


class Call(NamedTuple):
    """One pass over buffers of its own. reads: what goes in; run: returns what comes out."""

    reads: list[Tensor]
    run: Callable[[Backend], Any]


class Pass(NamedTuple):
    """make: a call over new buffers; check: compares its results with the reference, None or what is wrong."""

    op: str
    use: str
    rotates: bool
    make: Callable[[], Call]
    check: Callable[[Call], str | None]


# --- Activations


def activations(*shape: int) -> Tensor:
    """Gaussian, with a few channels 30 times as large: what the rotation is for."""
    x = torch.randn(shape, device=DEVICE)
    x[..., :: shape[-1] // 4] *= 30
    return x.to(dtype())


def vector(size: int) -> Tensor:
    return (1 + 0.3 * torch.randn(size, device=DEVICE)).to(dtype())


@cache
def dtype() -> torch.dtype:
    return compute_dtype(torch.device(DEVICE))


def add_norm(tokens: int, branched: bool, normed: bool, group: int | None) -> Callable[[], Call]:
    def make() -> Call:
        x = activations(tokens, DIM).to(stream_dtype(dtype()))
        branch = Branch(activations(tokens, DIM), vector(DIM), vector(DIM).tanh(), EPS) if branched else None
        norm = Norm(vector(DIM), vector(DIM), EPS) if normed else None
        return Call(tensors(x, branch, norm), lambda backend: ops.add_norm(x, branch, norm, group, backend))

    return make


def quantize_rows(tokens: int, columns: int) -> Callable[[], Call]:
    def make() -> Call:
        x = activations(tokens, columns)
        return Call([x], lambda backend: ops.quantize_rows(x, GROUP, backend))

    return make


def norm_rope(tokens: int, group: int | None, centre: list[int] | None) -> Callable[[], Call]:
    def make() -> Call:
        x, angles = activations(tokens, HEADS, HEAD_DIM), 6 * torch.rand(tokens, HEAD_DIM // 2, device=DEVICE)
        given = (x, vector(HEAD_DIM), angles.cos(), angles.sin())
        return Call(list(given), lambda backend: ops.norm_rope(*given, EPS, group, centre, backend))

    return make


def passes(tokens: int) -> Iterator[Pass]:
    """As a block uses them; `norm_rope` of keys reads a sixteenth of them twice, for their mean."""
    for name, branched, normed in (("norm", False, True), ("residual, norm", True, True), ("residual", True, False)):
        for group in (None, GROUP) if normed else (None,):
            use = f"{name} -> {('int8' if group else '16-bit') if normed else 'stream'}"
            yield Pass("add_norm", use, bool(group), add_norm(tokens, branched, normed, group), as_reference)
    for columns in (DIM, HIDDEN):
        yield Pass("quantize_rows", f"rows of {columns}", True, quantize_rows(tokens, columns), as_reference)
    yield Pass("norm_rope", "16-bit", False, norm_rope(tokens, None, None), as_reference)
    yield Pass("norm_rope", "int8 queries", True, norm_rope(tokens, HEAD_GROUP, None), as_reference)
    yield Pass("norm_rope", "int8 keys, centred", True, norm_rope(tokens, HEAD_GROUP, [tokens]), as_reference)


def as_reference(call: Call) -> str | None:
    return difference(call.run("triton"), call.run("reference"))


def difference(got: Any, expected: Any) -> str | None:
    """16-bit values: both are rounded, and so was a sum before them, which may be a step apart: two steps in all."""
    if isinstance(got, Int8Rows):
        return same_rows("int8", got, expected)
    if isinstance(got, Tensor):
        floor = 1e-4 * expected.double().square().mean().sqrt()
        return worst("16-bit", got, expected, 2 * torch.finfo(got.dtype).eps * expected.double().abs() + floor)
    return first(difference(*pair) for pair in zip(got or (), expected or (), strict=True))


# --- Weights


def unpacking(stored: StoredTensor) -> Iterator[Pass]:
    """To 16 bits, and to rotated int8. An int4 has its rotation already: it is taken back for 16 bits, kept for 8."""
    kind, shape = stored.format.name, f"{stored.format.name} {stored.shape[0]} x {stored.shape[1]}"
    weight = stored.read().to(DEVICE)
    group = weight.options["group"] if kind == "int4" else rotation_group(stored.columns)

    def make(int8: bool) -> Call:
        parts = {name: part.clone() for name, part in weight.parts.items()}

        def run(backend: Backend) -> Tensor | Int8Rows:
            if int8:
                codes = Int8Rows.empty(*weight.shape, torch.device(DEVICE))
                ops.requantize(kind, parts, weight.options, codes, group)
                return codes
            wide = torch.empty(weight.shape, dtype=dtype(), device=DEVICE)
            ops.dequantize(kind, parts, weight.options, wide)
            return wide

        return Call(list(parts.values()), run)

    def check(call: Call) -> str | None:
        got = call.run("triton")
        truth = stored.read(0, CHECKED_ROWS).dequantize().to(DEVICE)
        if isinstance(got, Tensor):
            return difference(got[:CHECKED_ROWS], truth)
        got = Int8Rows(*(part[:CHECKED_ROWS] for part in got))
        if kind != "int4":
            return same_rows("int8", got, ops.quantize_rows_reference(truth, group))
        back = ops.hadamard_rotate(got.codes * got.scale[:, None], group)
        return worst("int8", back, truth, (truth.abs().max() * 2.0**-20).double())

    yield Pass("dequantize", shape, kind == "int4", lambda: make(False), check)
    yield Pass("requantize", shape, kind != "int4", lambda: make(True), check)


def weights() -> Iterator[StoredTensor]:
    for to, name in WEIGHTS:
        tensors = synthetic_checkpoint(TransformerConfig(), target(to)).tensors
        yield tensors[f"layers.4.feed_forward.{name}.weight"]


# --- Rates


def measured(each: Pass, l2_bytes: int) -> dict[str, Any]:
    call = each.make()
    wrong = each.check(call)
    n_bytes = moved(call.reads, call.run("triton"))
    calls = [call, *(each.make() for _ in range(sets_for(n_bytes, l2_bytes) - 1))]
    times = cold_milliseconds([lambda call=call: call.run("triton") for call in calls])
    row = judged(n_bytes, times, copy_ms(n_bytes, l2_bytes), each.rotates, issue_gbps())
    return {"op": each.op, "use": each.use, **row, "check": wrong or "ok"}


def issue_gbps() -> float:
    """What the card would move at PER_CLOCK."""
    properties = torch.cuda.get_device_properties(0)
    return PER_CLOCK * properties.multi_processor_count * getattr(properties, "clock_rate", math.inf) / 1e6


def judged(n_bytes: int, times: Times, copy_ms: float, rotates: bool, issue_gbps: float = math.inf) -> dict[str, Any]:
    """of_copy: how much of the bandwidth of a copy of as many bytes."""
    share, bar = copy_ms / times[1], OF_COPY_ROTATING if rotates else OF_COPY
    rates = {"gbps": n_bytes / times[1] / 1e6, "copy_gbps": n_bytes / copy_ms / 1e6, "of_copy": share}
    limit = min(rates["copy_gbps"], issue_gbps)
    return {"bytes": n_bytes, **spread(times), **rates, "bar": bar, "kept": rates["gbps"] >= bar * limit}


def moved(reads: list[Tensor], results: Any) -> int:
    """Bytes of what is read and of what is written. A result that is one of the inputs was left as it is."""
    given = {tensor.data_ptr() for tensor in reads}
    written = [tensor for tensor in tensors(results) if tensor.data_ptr() not in given]
    return sum(tensor.nbytes for tensor in (*reads, *written))


def tensors(*nested: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


def copied(source: Tensor, into: Tensor) -> Tensor:
    """int32, contiguous. Four loads of 16 bytes for each thread."""
    block = 4096
    _copy_kernel[(cdiv(source.numel(), block),)](source, into, source.numel(), block, num_warps=8, **OPTIONS)
    return into


@jit
def _copy_kernel(source_ptr: tl.tensor, into_ptr: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(into_ptr + at, tl.load(source_ptr + at, mask=at < count), mask=at < count)


@cache
def copy_ms(n_bytes: int, l2_bytes: int) -> float:
    """Of copying half as many bytes from one place on the device to another."""

    def one() -> Callable[[], Tensor]:
        source, into = (torch.zeros(n_bytes // 8, dtype=torch.int32, device=DEVICE) for _ in range(2))
        return lambda: copied(source, into)

    return cold_milliseconds([one() for _ in range(sets_for(n_bytes, l2_bytes))])[1]


def rows(all_tokens: list[int]) -> Iterator[dict[str, Any]]:
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    gbps = LONG_COPY_BYTES / copy_ms(LONG_COPY_BYTES, l2_bytes) / 1e6
    yield {"op": "copy", "use": "the ceiling", "bytes": LONG_COPY_BYTES, "copy_gbps": gbps}
    for tokens in all_tokens:
        for each in passes(tokens):
            yield {"tokens": tokens, **measured(each, l2_bytes)}
    for stored in weights():
        for each in unpacking(stored):
            yield measured(each, l2_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1152, 4224])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    need_cuda()
    with torch.inference_mode():
        found = report(rows(options.tokens), options.out)
    sys.exit(any(row.get("check", "ok") != "ok" for row in found))


if __name__ == "__main__":
    main()
