"""Attention on Z-Image's shapes against torch's own kernels, in the same run.

    python benchmarks/ops/bench_attention.py [--tokens 4224 16512] [--out benchmarks/results/NAME.json]

30 heads of 128. Beside ours: torch's FLASH_ATTENTION, and cuDNN's where torch has it. The error is that of each
against float32, on the first 1152 tokens. `kept`: whether int8 is TIMES_FLASH times as fast as FLASH_ATTENTION, at
1024x1024 and above.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import milliseconds, need_cuda, report, spread
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from zimage_kernels import attention, attention_int8, flash_attention

HEADS = 30
CHECKED = 1152
TIMES_FLASH, FEWEST = 1.3, 4224


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = (x.float().abs().amax(-1) / 127).T.contiguous().T
    return (x / scale[..., None]).round().clamp(-127, 127).char(), scale


def torchs(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in (q, k, v)))[0].transpose(0, 1)

    return call


def int8(float16_sums: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """With the quantization left out of the time: in the model it is part of another pass."""
    held: dict[tuple[int, int], Any] = {}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        key = (q.data_ptr(), len(q))
        if key not in held:
            held[key] = (*quantized(q), *quantized(k))
        return attention_int8(*held[key], v, [len(q)], float16_sums, backend="triton")

    return call


def ways(dtype: torch.dtype) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    found = {
        "torch flash": torchs(SDPBackend.FLASH_ATTENTION),
        "torch cudnn": torchs(SDPBackend.CUDNN_ATTENTION),
        "flash_attention": lambda q, k, v: flash_attention(q, k, v, [len(q)], backend="triton"),
        "attention_int8": int8(False),
    }
    return found | ({"attention_int8, fp16 sums": int8(True)} if dtype == torch.float16 else {})


def measure(tokens: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    q, k, v = (torch.randn(tokens, HEADS, 128, device="cuda", dtype=dtype) for _ in range(3))
    few = [t[:CHECKED].clone() for t in (q, k, v)]
    truth = attention(*(t.float() for t in few), [len(few[0])])
    rows: list[dict[str, Any]] = []
    for name, call in ways(dtype).items():
        try:
            error = ((call(*few).float() - truth).norm() / truth.norm()).item()
            times = milliseconds(lambda call=call: call(q, k, v))
        except RuntimeError as unavailable:
            rows.append({"op": name, "tokens": tokens, "dtype": str(dtype), "error": str(unavailable).splitlines()[0]})
            continue
        ratio = rows[0].get("ms", float("nan")) / times[1] if rows else 1.0
        rows.append({
            "op": name, "tokens": tokens, "dtype": str(dtype), **spread(times),
            "tflops": 4 * tokens**2 * HEADS * 128 / times[1] / 1e9, "times_torch_flash": ratio, "relative_error": error,
            **({"kept": ratio >= TIMES_FLASH} if name.startswith("attention_int8") and tokens >= FEWEST else {}),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1152, 4224, 16512])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    need_cuda()
    report((r for n in options.tokens for t in (torch.bfloat16, torch.float16) for r in measure(n, t)), options.out)


if __name__ == "__main__":
    main()
