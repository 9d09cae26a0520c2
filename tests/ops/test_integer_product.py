"""Sums of 8-bit products, exact on CPUs with units for them and on those without."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
CODE = """
import time, torch
from zimage_kernels import cpu_has_int8_units, integer_product

def truth(x, w):
    return x.double() @ w.double().T

def seconds(multiply):
    times = []
    for _ in range(3):
        start = time.perf_counter()
        multiply()
        times.append(time.perf_counter() - start)
    return min(times)

x, w = (torch.randint(-128, 128, (rows, 2560), dtype=torch.int8) for rows in (520, 2060))
x[0], x[1], w[0], w[1] = 127, -128, 127, -128
assert torch.equal(integer_product(x, w).double(), truth(x, w))
exact = torch.equal(torch._int_mm(x, w.T).double(), truth(x, w))
x, w = x[:128, :1024].contiguous(), w[:512, :1024].contiguous()
float_x, float_w = x.float(), w.float()
ratio = seconds(lambda: torch._int_mm(x, w.T)) / seconds(lambda: float_x @ float_w.T)
print(cpu_has_int8_units(), exact, ratio)
"""


@pytest.mark.parametrize("instructions", ["AVX2", "all"])
def test_exact_and_no_slower(instructions: str) -> None:
    """A process that may not use VNNI is what a CPU without it is. Torch's own product is taken where it is exact and
    faster than float32 in that process, whatever the processor; twice as slow or as fast leaves room for noise."""
    limit = {} if instructions == "all" else {"ONEDNN_MAX_CPU_ISA": instructions}
    environment = {**os.environ, "PYTHONPATH": str(KERNELS), **limit}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    has_units, exact, ratio = done.stdout.split()
    if has_units == "True":
        assert exact == "True"
        assert float(ratio) < 2
    elif platform.machine().lower() in ("x86_64", "amd64"):
        assert exact == "False" or float(ratio) > 0.5
