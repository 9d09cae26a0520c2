"""The int8 products on Z-Image's shapes, against the card's ceilings measured in the same run.

    python benchmarks/ops/bench_linear_int8.py [--tokens 1152 4224] [--out benchmarks/results/NAME.json]

Ceilings: torch._int_mm and a bf16 matmul of 8192 x 8192 x 8192. Beside each product: the same in bf16 by cuBLAS, and
torch._int_mm with the scales applied after it. q, k and v are three products, as in a block. `project_rows`, the first
half of an adapter's low-rank term, stands beside cuBLAS on bf16 rows, with and without making these of the 8-bit ones;
its gbps count each operand once. `kept`: whether a product of at least FEWEST rows, the tokens of
512x512, reaches OF_CEILING of the int8 ceiling and is TIMES_BF16 times as fast as bf16.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import Times, milliseconds, need_cuda, report, spread
from torch import Tensor
from zimage_kernels import linear_int8, linear_int8_reference, project_rows, swiglu_int8

SHAPES = {"q, k, v": (3, 3840, 3840), "out": (1, 3840, 3840), "w2": (1, 3840, 10240)}  # weights, N, K
HIDDEN, DIM = 10240, 3840
RANKS = (16, 64)
OF_CEILING, TIMES_BF16, FEWEST = 0.75, 1.6, 1152


def codes(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    values = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device="cuda")
    return values, torch.rand(rows, device="cuda") / 1000


def teraops(rows: int, outputs: int, columns: int, time_ms: float) -> float:
    return 2 * rows * outputs * columns / time_ms / 1e9


def ceilings() -> dict[str, Any]:
    side = 8192
    x, w = codes(side, side)[0], codes(side, side)[0]
    x16, w16 = x.bfloat16(), w.bfloat16()
    int8 = teraops(side, side, side, milliseconds(lambda: torch._int_mm(x, w.T))[1])
    bf16 = teraops(side, side, side, milliseconds(lambda: x16 @ w16.T)[1])
    return {"op": "ceilings", "int8_tops": int8, "bf16_tflops": bf16}


def judged(name: str, rows: int, ops: float, times: Times, bf16_ms: float, ceiling: float) -> dict[str, Any]:
    """ops: multiplications and additions; ceiling: tera-operations per second."""
    tops = ops / times[1] / 1e9
    row: dict[str, Any] = {"op": name, "M": rows, **spread(times), "tops": tops, "of_ceiling": tops / ceiling}
    row["times_bf16"] = bf16_ms / times[1]
    kept = row["of_ceiling"] >= OF_CEILING and row["times_bf16"] >= TIMES_BF16
    return row | ({"kept": kept} if rows >= FEWEST else {})


def linear(name: str, rows: int, ceiling: float) -> dict[str, Any]:
    count, outputs, columns = SHAPES[name]
    x, weights = codes(rows, columns), [codes(outputs, columns) for _ in range(count)]
    x16, wide = x[0].bfloat16(), [w[0].bfloat16() for w in weights]
    times = milliseconds(lambda: [linear_int8(*x, *w, backend="triton") for w in weights])
    bf16_ms = milliseconds(lambda: [x16 @ w.T for w in wide])[1]
    row = judged(f"linear_int8 {name}", rows, 2 * rows * count * outputs * columns, times, bf16_ms, ceiling)
    return row | {"times_int_mm": milliseconds(lambda: [linear_int8_reference(*x, *w) for w in weights])[1] / times[1]}


def swiglu(rows: int, ceiling: float) -> dict[str, Any]:
    x, w1, w3 = codes(rows, DIM), codes(HIDDEN, DIM), codes(HIDDEN, DIM)
    x16, w16 = x[0].bfloat16(), [w[0].bfloat16() for w in (w1, w3)]
    times = milliseconds(lambda: swiglu_int8(*x, *w1, *w3, backend="triton"))
    bf16_ms = milliseconds(lambda: F.silu(x16 @ w16[0].T) * (x16 @ w16[1].T))[1]
    return judged("swiglu_int8", rows, 4 * rows * HIDDEN * DIM, times, bf16_ms, ceiling)


def projection(rows: int, rank: int) -> dict[str, Any]:
    (x, scale), a = codes(rows, DIM), torch.randn(rank, DIM, device="cuda", dtype=torch.bfloat16)
    wide = x.bfloat16()
    times = milliseconds(lambda: project_rows(x, scale, a, backend="triton"))
    row: dict[str, Any] = {"op": f"project_rows rank {rank}", "M": rows, **spread(times)}
    row["gbps"] = (x.nbytes + scale.nbytes + a.nbytes + 2 * rows * rank) / times[1] / 1e6
    row["times_bf16"] = milliseconds(lambda: wide @ a.T)[1] / times[1]
    return row | {"times_widened": milliseconds(lambda: (x * scale[:, None]).bfloat16() @ a.T)[1] / times[1]}


def measured(all_tokens: list[int]) -> Iterator[dict[str, Any]]:
    found = ceilings()
    yield found
    for tokens in all_tokens:
        for name in SHAPES:
            yield linear(name, tokens, found["int8_tops"])
        yield swiglu(tokens, found["int8_tops"])
        for rank in RANKS:
            yield projection(tokens, rank)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[128, 1152, 4224, 16512])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    need_cuda()
    report(measured(options.tokens), options.out)


if __name__ == "__main__":
    main()
