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
import torch
from zimage_kernels import cpu_has_int8_units, integer_product

def truth(x, w):
    return x.double() @ w.double().T

x, w = (torch.randint(-128, 128, (rows, 2560), dtype=torch.int8) for rows in (520, 2060))
x[0], x[1], w[0], w[1] = 127, -128, 127, -128
assert torch.equal(integer_product(x, w).double(), truth(x, w))
print(cpu_has_int8_units(), torch.equal(torch._int_mm(x, w.T).double(), truth(x, w)))
"""


@pytest.mark.parametrize("instructions", ["AVX2", "all"])
def test_exact(instructions: str) -> None:
    """A process that may not use VNNI is what a CPU without it is: torch alone gets its sums wrong there."""
    limit = {} if instructions == "all" else {"ONEDNN_MAX_CPU_ISA": instructions}
    environment = {**os.environ, "PYTHONPATH": str(KERNELS), **limit}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    has_units, torch_is_right = done.stdout.split()
    if platform.machine().lower() in ("x86_64", "amd64"):
        assert has_units == torch_is_right
        assert limit == {} or has_units == "False"
