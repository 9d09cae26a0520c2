"""Random activations as the model has them, and the bars that every op is held to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from zimage_kernels.quantize import Int8Rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there Triton's interpreter runs the kernels


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Everything is made on DEVICE, and torch.empty gives NaN or the largest integer, so that an element that no kernel
    writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would refuse to multiply
    with torch.device(DEVICE):
        assert torch.empty(1).isnan()
        assert torch.empty(1, dtype=torch.int8) == 127
        yield
    torch.use_deterministic_algorithms(False)


def with_outliers(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian, with a few channels 30 times as large in every row, and one element in a thousand 100 times."""
    x = torch.randn(rows, columns)
    x[:, torch.randperm(columns)[: columns // 128 + 1]] *= 30
    x[torch.rand(rows, columns) < 1e-3] *= 100
    return x.to(dtype)


def assert_same_codes(ours: list[Int8Rows], expected: list[Int8Rows]) -> None:
    """Codes are a step apart only where float32 sums in another order fall on the other side of a half: in at most
    1e-4 of all elements. Before that x may have been rounded to 16 bits, there too on the other side of a half: that
    moves one element of 256 by 2^-11, and a scale by 2^-11 / 16 at most."""
    steps = torch.cat([(a.codes.int() - b.codes.int()).abs().flatten() for a, b in zip(ours, expected, strict=True)])
    assert steps.max() <= 1
    assert steps.count_nonzero() <= 1e-4 * steps.numel(), f"{steps.count_nonzero()} of {steps.numel()}"
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.scale, b.scale, rtol=2**-15, atol=0)


def assert_accurate(ours: Tensor, torchs: Tensor, truth: Tensor) -> None:
    """At most twice the error of torch in the same dtype. truth: float64."""
    assert ours.dtype == torchs.dtype
    error, allowed = ((t.double() - truth).norm() / truth.norm() for t in (ours, torchs))
    assert error <= 2 * allowed, f"{error:.3g} against {allowed:.3g}"
