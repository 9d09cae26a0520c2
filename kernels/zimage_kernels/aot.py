"""What has to be known of a kernel to compile it without a GPU and without tensors.

Each op module with a Triton kernel has a function

    def variants(arch: int) -> list[Variant]

that lists what may be launched on that compute capability (75, 80, 86, 89, 90, 120): every tile of
`tuning/sm_<arch>.json`, with the flags that change the code. An op that does not run there returns an empty list.
`tools/compile_kernels.py` finds these functions by themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One compilation of one kernel.

    name: op and tile, for the table. kernel: the @jit function, a Kernel.
    signature: type of every argument that is no constexpr, in Triton's spelling: "*i8", "*fp32", "i32", "fp32".
    constexprs: value of every constexpr argument; an absent optional pointer is a constexpr None.
    aligned: arguments whose value Triton finds divisible by 16 at run time: the pointers, and sizes such as K.
    matrix: the operand type that a tensor-core instruction must have ("s8", "f16", "bf16"), for each kind of
    product in the kernel; empty for element-wise kernels.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    aligned: tuple[str, ...]
    num_warps: int = 4
    num_stages: int = 3
    matrix: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
