"""A script for test_compile.py: what launches on an RTX 30 laptop would compile, recorded without one.

Launches every matrix kernel, on tensors of zeros, under a driver that only names the architecture; Triton's cache hook
sees what it would compile and stops it there. Prints the launches that are no variant of the compile tool, then the
variants that were not launched, as JSON.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

import torch
import triton
from compile_kernels import variants
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from zimage_kernels import attention_int8, flash_attention, linear_int8, swiglu_int8
from zimage_kernels.tuning import choose

ARCH = 86
ROWS = (1, 17, 1125, 4224)  # in every bucket; 4224 is a multiple of 16, which Triton must not care about
recorded: set[tuple[Any, ...]] = set()


class FakeDriver:
    """As much as is asked before anything compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def identity(kernel: str, signature: dict[str, str], constexprs: dict[str, Any], aligned: Any, *launch: int) -> Any:
    types = sorted((name, kind) for name, kind in signature.items() if kind != "constexpr")
    return kernel, tuple(types), tuple(sorted(constexprs.items())), tuple(sorted(aligned)), *launch


def record(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
    names = fn.jit_function.arg_names
    constexprs = {names[path[0]]: value for path, value in compile["constants"].items()}
    aligned = [names[path[0]] for path, attributes in compile["configs"][0].items() if attributes]
    kernel, launch = fn.name.rpartition(".")[2], (compile["num_warps"], compile["num_stages"])
    recorded.add(identity(kernel, compile["signature"], constexprs, aligned, *launch))
    return True


def launch_all(rows: int, columns: int) -> None:
    codes = torch.zeros(rows, columns, dtype=torch.int8), torch.ones(rows)
    weight = torch.zeros(64, columns, dtype=torch.int8), torch.ones(64)
    low_rank = torch.zeros(rows, 20).bfloat16(), torch.zeros(64, 20).bfloat16()
    linear_int8(*codes, *weight)
    swiglu_int8(*codes, *weight, *weight)
    if columns % 256:
        return
    linear_int8(*codes, *weight, torch.zeros(64).bfloat16(), low_rank, -7)
    swiglu_int8(*codes, *weight, *weight, low_rank, low_rank, -7)
    for dtype in (torch.float16, torch.bfloat16):
        q, k, v = torch.zeros(rows, 3, 3, 128, dtype=dtype).unbind(1)
        flash_attention(q, k, v, [rows])
        keys, scale = torch.zeros(rows, 3, 128, dtype=torch.int8), torch.zeros(3, rows).T
        attention_int8(keys, scale, keys, scale, v, [rows])
    attention_int8(keys, scale, keys, scale, v.half(), [rows], float16_sums=True)


driver.set_active(FakeDriver())
triton.knobs.runtime.jit_cache_hook = record
for name in ("attention", "linear_int8", "swiglu_int8"):
    module = importlib.import_module(f"zimage_kernels.{name}")
    module.use_triton = lambda *_: True  # type: ignore[attr-defined]
    module.tile = lambda op, rows, device: choose(op, rows, ARCH)  # type: ignore[attr-defined]
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
