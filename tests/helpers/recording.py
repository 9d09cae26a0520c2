"""What launches on a GPU would compile, recorded without one: for scripts that run without the interpreter.

A driver that only names the architecture lets a launch get as far as Triton's cache hook, which sees what would be
compiled and stops it there. Tensors may be on the CPU, or on the meta device, whose addresses are all aligned.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from zimage_kernels import _triton

Compilation = tuple[Any, ...]


class FakeDriver:
    """As much as is asked before anything compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def identity(
    kernel: str, signature: dict[str, str], constexprs: dict[str, Any], aligned: Any, *launch: int
) -> Compilation:
    types = sorted((name, kind) for name, kind in signature.items() if kind != "constexpr")
    return kernel, tuple(types), tuple(sorted(constexprs.items())), tuple(sorted(aligned)), *launch


def record(arch: int) -> set[Compilation]:
    """From now on every op runs its kernel where that architecture can, if it is asked for `triton`. Returns a set that
    fills with what would be compiled."""
    recorded: set[Compilation] = set()

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        names = fn.jit_function.arg_names
        constexprs = {names[path[0]]: value for path, value in compile["constants"].items()}
        aligned = [names[path[0]] for path, attributes in compile["configs"][0].items() if attributes]
        kernel, launch = fn.name.rpartition(".")[2], (compile["num_warps"], compile["num_stages"])
        recorded.add(identity(kernel, compile["signature"], constexprs, aligned, *launch))
        return True

    driver.set_active(FakeDriver(arch))
    triton.knobs.runtime.jit_cache_hook = hook
    torch.cuda.get_device_capability = lambda device=None: divmod(arch, 10)  # type: ignore[assignment]
    _triton.triton_obstacle = lambda device, least=75: None if arch >= least else "too old"
    return recorded
