"""auto falls back, an explicit choice works or says why not, and nothing needs Triton to be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
CODE = """
import sys
sys.modules.update({hidden})
import torch, zimage_kernels as kernels

x, scale = torch.ones(2, 64, dtype=torch.int8), torch.ones(2)
for backend in ("auto", "reference"):
    assert (kernels.linear_int8(x, scale, x, scale, backend=backend) == 64).all()
try:
    kernels.linear_int8(x, scale, x, scale, backend="triton")
except ValueError as error:
    print(error)
if "triton" in sys.modules:
    print(kernels.triton_obstacle(torch.device("cuda")))
"""


@pytest.mark.parametrize("hidden", [{"triton": None, "triton.language": None}, {}], ids=["absent", "no GPU"])
def test_a_kernel_that_cannot_run(hidden: dict[str, None]) -> None:
    """Only for a GPU does it matter whether Triton is there."""
    if not hidden:
        pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(hidden=hidden)],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": str(KERNELS)},
    )
    expected = ["backend triton: got tensors on cpu, expected cuda", *(["Triton is not installed"] if hidden else [])]
    assert done.stdout.splitlines() == expected, done.stderr
