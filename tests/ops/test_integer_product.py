"""Sums of 8-bit products, exact on CPUs with units for them and on those without."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from marking import always
from torch import Tensor
from zimage_kernels import integer_product_cpu

module = importlib.import_module("zimage_kernels.integer_product")  # not the function of that name

KERNELS = Path(__file__).parents[2] / "kernels"
CODE = """
import torch
from zimage_kernels import integer_product
from zimage_kernels.integer_product import cpu_product

x, w = (torch.randint(-128, 128, (rows, 2560), dtype=torch.int8) for rows in (520, 2060))
x[0], x[1], w[0], w[1] = 127, -128, 127, -128
truth = x.double() @ w.double().T
assert torch.equal(integer_product(x, w).double(), truth)
print(cpu_product(), torch.equal(torch._int_mm(x, w.T).double(), truth))
"""


@pytest.mark.slow  # a process for each
@pytest.mark.parametrize("instructions", always("AVX2", of=["AVX2", "all"]))
def test_exact(instructions: str) -> None:
    """A process that may not use VNNI is what a CPU without it is. Whatever multiplies there: torch's own product is
    never taken where it is not exact."""
    limit = {} if instructions == "all" else {"ONEDNN_MAX_CPU_ISA": instructions}
    environment = {**os.environ, "PYTHONPATH": str(KERNELS), **limit}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    product, exact = done.stdout.split()
    assert product in ("compiled", "float32") or (product, exact) == ("torch", "True")


@pytest.mark.parametrize(
    ("exact", "torch_ms", "ours_ms", "chosen"),
    [
        (True, 1, 3, "torch"),
        (True, 7, 3, "compiled"),
        (False, 1, 3, "compiled"),
        (True, 7, 9, "float32"),
        (False, 1, 9, "float32"),
        (False, 1, None, "float32"),
    ],
)
def test_the_fastest_that_is_exact(
    exact: bool, torch_ms: int, ours_ms: int | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where float32 takes 5 ms; None: numba cannot compile. By a clock that the products advance, for a real one tells
    of other programs, too."""
    now = [0.0]

    def taking(milliseconds: int, multiply: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*operands: Tensor) -> Any:
            now[0] += milliseconds
            return multiply(*operands)

        return timed

    ours = SimpleNamespace(product=taking(ours_ms, lambda x, w: None)) if ours_ms else None
    monkeypatch.setattr(module, "_torch_is_exact", lambda: exact)
    monkeypatch.setattr(module, "_compiled", lambda: ours)
    monkeypatch.setattr(module, "cpu_has_int8_units", module.cpu_has_int8_units.__wrapped__)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "_int_mm", taking(torch_ms, lambda x, w: None))
    monkeypatch.setattr(Tensor, "__matmul__", taking(5, lambda x, w: None))
    threads = torch.get_num_threads()
    assert module.cpu_product.__wrapped__() == chosen
    assert torch.get_num_threads() == threads


# Less than a micro-tile of 6 x 16 sums, several tiles of 192 x 256 with edges, depths of 768 and what remains.
@pytest.mark.parametrize(
    "shape", [(1, 1, 16), (6, 16, 768), (37, 53, 1000), (200, 300, 1600), (389, 517, 2304), (0, 5, 16)]
)
def test_the_compiled_product(shape: tuple[int, int, int]) -> None:
    rows, outputs, columns = shape
    x, w = (torch.randint(-128, 128, (n, columns), dtype=torch.int8) for n in (rows, outputs))
    sums = integer_product_cpu.product(x, w)
    assert torch.equal(sums.double(), x.double() @ w.double().T)
    x_scale, w_scale = torch.rand(rows), torch.rand(outputs)
    y = integer_product_cpu.scaled_product(x, x_scale, w, w_scale)
    assert torch.equal(y, sums.float().mul_(x_scale[:, None]).mul_(w_scale))


def test_the_largest_sums_of_the_compiled_product() -> None:
    """Pairs of -128 would overflow 16 bits, and 10240 columns are the most that Z-Image has."""
    x = torch.full((7, 10240), -128, dtype=torch.int8)
    assert (integer_product_cpu.product(x, x) == 10240 * 128**2).all()
    assert integer_product_cpu.is_exact()


def test_operands_that_are_views() -> None:
    x, w = torch.randint(-128, 128, (9, 64), dtype=torch.int8), torch.randint(-128, 128, (32, 20), dtype=torch.int8).T
    assert torch.equal(integer_product_cpu.product(x[:, ::2], w).double(), x[:, ::2].double() @ w.double().T)


@pytest.mark.slow  # starts Python anew
@pytest.mark.parametrize(
    ("stand_in", "variables", "obstacle"),
    [
        ("raise ImportError('needs NumPy 2.2 or less')", {}, "cannot be imported (needs NumPy 2.2 or less)"),
        ("raise AttributeError('no attribute long')", {}, "cannot be imported (no attribute long)"),
        (None, {"NUMBA_DISABLE_JIT": "1"}, "NUMBA_DISABLE_JIT is set"),
        (None, {}, "None"),
    ],
)
def test_a_numba_that_cannot_compile(
    tmp_path: Path, stand_in: str | None, variables: dict[str, str], obstacle: str
) -> None:
    if stand_in:
        (tmp_path / "numba.py").write_text(stand_in)
    asked = "import sys, zimage_kernels; m = sys.modules['zimage_kernels.integer_product']"
    asked += "; print(m.loops_obstacle(), m._compiled() is None)"
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    environment = {**os.environ, **variables, "PYTHONPATH": paths}
    said = subprocess.run([sys.executable, "-c", asked], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip().endswith(f"{obstacle} {obstacle != 'None'}")
