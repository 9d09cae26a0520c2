"""The int8 products on Z-Image's shapes, against the card's ceilings measured in the same run.

    python benchmarks/ops/bench_linear_int8.py [--tokens 1152 4224] [--out benchmarks/results/NAME.json]

Ceilings: torch._int_mm and a bf16 matmul of 8192 x 8192 x 8192. Beside each product: the same in bf16 by cuBLAS, and
torch._int_mm with the scales applied after it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import milliseconds, report
from torch import Tensor
from zimage_kernels import linear_int8, linear_int8_reference, swiglu_int8

SHAPES = {"qkv": (11520, 3840), "out": (3840, 3840), "w2": (3840, 10240)}  # [N, K]
HIDDEN, DIM = 10240, 3840


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


def linear(name: str, rows: int, ceiling: float) -> dict[str, Any]:
    outputs, columns = SHAPES[name]
    x, w = codes(rows, columns), codes(outputs, columns)
    x16, w16 = x[0].bfloat16(), w[0].bfloat16()
    low, time_ms, high = milliseconds(lambda: linear_int8(*x, *w, backend="triton"))
    tops = teraops(rows, outputs, columns, time_ms)
    return {
        "op": f"linear_int8 {name}", "M": rows, "ms_p20": low, "ms": time_ms, "ms_p80": high,
        "tops": tops, "of_ceiling": tops / ceiling,
        "times_bf16": milliseconds(lambda: x16 @ w16.T)[1] / time_ms,
        "times_int_mm": milliseconds(lambda: linear_int8_reference(*x, *w))[1] / time_ms,
    }  # fmt: skip


def swiglu(rows: int, ceiling: float) -> dict[str, Any]:
    x, w1, w3 = codes(rows, DIM), codes(HIDDEN, DIM), codes(HIDDEN, DIM)
    x16, w16 = x[0].bfloat16(), [w[0].bfloat16() for w in (w1, w3)]
    low, time_ms, high = milliseconds(lambda: swiglu_int8(*x, *w1, *w3, backend="triton"))
    tops = teraops(rows, 2 * HIDDEN, DIM, time_ms)
    return {
        "op": "swiglu_int8", "M": rows, "ms_p20": low, "ms": time_ms, "ms_p80": high,
        "tops": tops, "of_ceiling": tops / ceiling,
        "times_bf16": milliseconds(lambda: F.silu(x16 @ w16[0].T) * (x16 @ w16[1].T))[1] / time_ms,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[128, 1152, 4224, 16512])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = [ceilings()]
    ceiling = rows[0]["int8_tops"]
    for tokens in options.tokens:
        rows += [linear(name, tokens, ceiling) for name in SHAPES]
        rows.append(swiglu(tokens, ceiling))
    report(rows, options.out)


if __name__ == "__main__":
    main()
