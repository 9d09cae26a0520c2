"""Runs the kernels of laptop GPUs on the GPU at hand: their code for 8.6, 8.9 and 7.5, with their tiles.

    python benchmarks/ops/check_laptop_ptx.py [--arch 86 89 75] [--ops attention_int8 ...] [--out NAME.json]

In a process for each architecture and op, Triton and our launchers are told that the GPU is of that architecture. What
Triton compiles is loaded as PTX, which the driver compiles for the GPU at hand (PTX of one architecture runs on every
newer one), in place of the machine code, which no other GPU runs; then Triton's own launcher launches it, and the
self-test (`zimage_lite/doctor/selftest`) compares it with the references. That covers everything up to the PTX, shared
memory, warps and grids. What it does not: the machine code that ptxas makes of it for a laptop, and its speed there.

Exits with 1 unless every op is ok on every architecture.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch
from timing import need_cuda, report

from zimage_lite.doctor.selftest.checks import CHECKS
from zimage_lite.doctor.selftest.process import one_line, run_checks

ARCHITECTURES = (86, 89, 75)
PROCESSES = 12  # each holds a context, and compiles for most of its time
LIMIT_SECONDS = 150  # of one op: twenty compilations by Triton, and as many by the driver


def pretend(arch: int) -> list[str]:
    """From now on kernels are compiled for that architecture and loaded as PTX. Returns a list that fills with what was
    loaded: "kernel for sm_86"."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver

    loaded: list[str] = []
    make = CompiledKernel.__init__

    def make_of_ptx(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        ptx = self.asm["ptx"]
        self.kernel = ptx.encode()  # what the driver is given, in place of the machine code
        loaded.append(f"{self.name} for {re.findall(r'^.target (sm_[0-9a-z]+)', ptx, re.MULTILINE)[0]}")

    CompiledKernel.__init__ = make_of_ptx
    driver.active.get_current_target = lambda: GPUTarget("cuda", arch, 32)
    torch.cuda.get_device_capability = lambda device=None: divmod(arch, 10)  # type: ignore[assignment]
    return loaded


def cap_ptx_version(arch: int) -> None:
    """A driver older than Triton's ptxas knows only older versions of PTX, which these kernels do with."""
    from triton.backends.nvidia.compiler import get_ptxas, ptx_get_version
    from zimage_kernels._triton import OPTIONS

    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    of_driver = ptx_get_version(f"{version.value // 1000}.{version.value % 1000 // 10}")  # 12080 is CUDA 12.8
    OPTIONS["ptx_version"] = min(of_driver, ptx_get_version(get_ptxas(arch).version))


def run_op(arch: int, op: str, device: torch.device) -> dict[str, Any]:
    loaded = pretend(arch)
    state = "not tested"
    for _, verdict in run_checks(device, [op]):
        if verdict is not None:
            state = "ok" if verdict.trusted else f"{verdict.state}: {verdict.reason}"
    return judged(loaded, arch, state)


def judged(loaded: list[str], arch: int, state: str) -> dict[str, Any]:
    """Only what was loaded can have been checked, and only if it was of that architecture."""
    right = bool(loaded) and all(one.endswith(f" for sm_{arch}") for one in loaded)
    return {"kernels": len(loaded), "check": state, "kept": right and state == "ok"}


def in_process(arch: int, op: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", str(arch), op]
    row = {"op": op, "arch": arch}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return row | {"check": f"took longer than {LIMIT_SECONDS} s", "kept": False}
    if done.returncode:
        last = one_line("".join(done.stderr.strip().splitlines()[-1:]))
        return row | {"check": f"ended with {done.returncode}: {last}", "kept": False}
    return row | dict(json.loads(done.stdout.splitlines()[-1]))


def applicable(archs: list[int], ops: list[str]) -> list[tuple[int, str]]:
    """Those with products, which are compiled in every tile, first."""
    pairs = [(arch, op) for arch, op in product(archs, ops) if CHECKS[op][1] <= arch]
    return sorted(pairs, key=lambda pair: -list(CHECKS).index(pair[1]))


def rows(archs: list[int], ops: list[str]) -> Iterator[dict[str, Any]]:
    with ThreadPoolExecutor(min(PROCESSES, os.cpu_count() or 1)) as pool:
        yield from pool.map(lambda pair: in_process(*pair), applicable(archs, ops))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="*", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--ops", nargs="*", choices=list(CHECKS), default=list(CHECKS))
    parser.add_argument("--one", nargs=2, metavar=("ARCH", "OP"), help="used by the others")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    need_cuda()
    if options.one:
        arch, op = int(options.one[0]), options.one[1]
        cap_ptx_version(arch)
        print(json.dumps(run_op(arch, op, torch.device("cuda"))))
        return
    found = report(rows(options.arch, options.ops), options.out)
    sys.exit(not all(row["kept"] for row in found))


if __name__ == "__main__":
    main()
