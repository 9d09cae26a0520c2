"""What calibration gains and costs at the true width, on synthetic inputs: blind, weighted, made up for.

    python benchmarks/calibration_full_width.py --out benchmarks/results/calibration/full_width_cpu.json

Inputs: 3840 channels that go together (a mix of 480 directions whose strength falls, and noise), of log-normal sizes,
with 1 % of the channels 10 to 50 times as large, as the outlier channels of diffusion transformers are. X^T X is known
in blocks of 256, of 1280, or whole. Weights: heavy tails. Statistics are of 8192 rows of inputs, the error is measured
on 4096 others; so many rows of a layer are quantized. Seconds are of processor time, for a million weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_size import machine
from torch import Tensor

from zimage_lite import __version__
from zimage_lite.bench.machine import commit
from zimage_lite.memory.meter import peak_rss_bytes
from zimage_lite.quant.formats import FORMATS
from zimage_lite.quant.inputs import Inputs

COLUMNS, WIDTHS = 3840, (256, 1280, 3840)
FORMAT_NAMES = ("q2_k", "q3_k", "iq4_xs", "q4_k", "q4_0", "q5_k", "q6_k", "int4", "nf4", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--formats", nargs="+", default=FORMAT_NAMES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(11)
    seen, unseen = inputs(rng, 8192, 4096)
    weight = torch.from_numpy((0.02 * rng.standard_t(5, (args.rows, COLUMNS))).astype(np.float32))
    squares = seen.square().mean(0)
    ways = {
        "blind": ("reference", None),
        "best": ("best", None),
        "weighted": ("reference", Inputs(squares)),
        "weighted, best": ("best", Inputs(squares)),
        **{f"blocks of {width}": ("best", Inputs(squares, blocks(seen, width))) for width in WIDTHS},
    }
    for _, known in ways.values():
        if known is not None and known.hessian is not None:
            list(known.spans(256))
    rows = []
    for name in args.formats:
        for how in ways.values():
            measured(name, weight[:1], unseen[:1], *how)  # loads what is compiled
        found = {way: measured(name, weight, unseen, *how) for way, how in ways.items()}
        rows.append({"format": name, **found})
        print(json.dumps(rows[-1]), flush=True)
    setup = {"rows": args.rows, "threads": 1, "peak_rss_bytes": peak_rss_bytes()}
    result = {"machine": machine(), "version": __version__, "commit": commit(), **setup, "formats": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def inputs(rng: np.random.Generator, *counts: int) -> list[Tensor]:
    """[count, COLUMNS] float32 each."""
    directions = rng.normal(0, 1, (480, COLUMNS)) * np.linspace(1, 0.1, 480)[:, None] / np.sqrt(480)
    sizes = np.exp(rng.normal(0, 0.7, COLUMNS))
    sizes[rng.permutation(COLUMNS)[: COLUMNS // 100]] *= rng.uniform(10, 50, COLUMNS // 100)
    found = []
    for count in counts:
        x = rng.normal(0, 1, (count, 480)) @ directions + 0.3 * rng.normal(0, 1, (count, COLUMNS))
        found.append(torch.from_numpy((x * sizes).astype(np.float32)))
    return found


def blocks(x: Tensor, width: int) -> Tensor:
    """The mean of x^T x along its diagonal."""
    parts = x.view(len(x), -1, width).transpose(0, 1)
    return torch.bmm(parts.transpose(1, 2), parts) / len(x)


def measured(name: str, weight: Tensor, unseen: Tensor, effort: str, known: Inputs | None) -> dict[str, Any]:
    codec = FORMATS[name].codec
    options, start = codec.options(COLUMNS), time.process_time()
    parts = codec.quantize(weight, options, effort, known)
    seconds = time.process_time() - start
    true, found = unseen @ weight.t(), unseen @ codec.dequantize(parts, COLUMNS, options).t()
    error = float((found - true).norm() / true.norm())
    return {"output_error": round(error, 5), "seconds_per_million": round(seconds / weight.numel() * 1e6, 3)}


if __name__ == "__main__":
    main()
