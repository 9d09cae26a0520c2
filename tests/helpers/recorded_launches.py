"""A script for test_compile.py: what launches on an RTX 30 laptop would compile, recorded without one.

Launches every matrix kernel, on tensors of zeros. Prints the launches that are no variant of the compile tool, then the
variants that were not launched, as JSON.
"""

from __future__ import annotations

import json
from functools import partial

import torch
import zimage_kernels as ops
from compile_kernels import variants
from recording import identity, record

ARCH = 86
ROWS = (1, 17, 1125, 4224)  # in every bucket; 4224 is a multiple of 16, which Triton must not care about
linear_int8, swiglu_int8, flash_attention, attention_int8, project_rows = (
    partial(op, backend="triton")
    for op in (ops.linear_int8, ops.swiglu_int8, ops.flash_attention, ops.attention_int8, ops.project_rows)
)


def launch_all(rows: int, columns: int) -> None:
    codes = torch.zeros(rows, columns, dtype=torch.int8), torch.ones(rows)
    weight = torch.zeros(64, columns, dtype=torch.int8), torch.ones(64)
    low_rank = torch.zeros(rows, 20).bfloat16(), torch.zeros(64, 20).bfloat16()
    linear_int8(*codes, *weight)
    swiglu_int8(*codes, *weight, *weight)
    if columns % 256:
        return
    linear_int8(*codes, *weight, low_rank=low_rank)
    for terms in (None, low_rank):  # v, where its sums are float16
        linear_int8(*codes, *weight, low_rank=terms, out_dtype=torch.float16)
    if rows == 1:
        linear_int8(*codes, *weight, torch.zeros(64).bfloat16(), low_rank, -7)
    swiglu_int8(*codes, *weight, *weight, low_rank, low_rank, -7)
    for dtype in (torch.float16, torch.bfloat16):
        for rank in (1, 16, 20, 64, 100):
            project_rows(*codes, torch.zeros(rank, columns, dtype=dtype))
        q, k, v = torch.zeros(rows, 3, 3, 128, dtype=dtype).unbind(1)
        flash_attention(q, k, v, [rows])
        keys, scale = torch.zeros(rows, 3, 128, dtype=torch.int8), torch.zeros(3, rows).T
        attention_int8(keys, scale, keys, scale, v, [rows])
    attention_int8(keys, scale, keys, scale, v.half(), [rows], float16_sums=True)


recorded = record(ARCH)
for rows in ROWS:
    launch_all(rows, 256)
launch_all(1, 48)
known = {
    identity(v.kernel.__name__, v.signature, v.constexprs, v.aligned, v.num_warps, v.num_stages): v.name
    for v in variants(ARCH)
    if v.matrix
}
not_launched = sorted(name for key, name in known.items() if key not in recorded)
print(json.dumps({"unknown": [str(key) for key in recorded - set(known)], "not_launched": not_launched}))
