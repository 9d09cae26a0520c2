"""A matrix in planes of 8 bits: what float32 holds of it is all there, in a product, too."""

from __future__ import annotations

import pytest
import torch
from zimage_kernels.planes import from_planes, in_planes, is_faster_in_planes, project_planes

HALF_STEP = 2.0**-24  # of float32, relative


@pytest.fixture
def narrow() -> torch.Tensor:
    """Rows of very different sizes, with outliers; one is zero, one has the smallest numbers that float32 holds."""
    a = torch.randn(48, 336) * torch.exp2(20 * torch.rand(48, 1) - 10)
    a[:, 7] *= 50
    a[3], a[4] = 0, a[4] * 1e-42
    return a


def test_no_number_is_off_by_more_than_float32_has_of_its_rows_largest(narrow: torch.Tensor) -> None:
    given = narrow.clone()
    planes = in_planes(given)
    assert planes.codes.data_ptr() == given.data_ptr()  # in its own place: nothing is held beside it
    lost = (from_planes(planes).double() - narrow.double()).abs()
    # The last plane's half step, and rounding of the scale.
    assert (lost <= 2 * HALF_STEP * narrow.double().abs().amax(1, keepdim=True) + 1e-42).all()
    assert torch.equal(from_planes(in_planes(narrow[:3].clone())), from_planes(in_planes(narrow.clone()))[:3])


@pytest.mark.parametrize("rows", [0, 1, 65])
def test_products(narrow: torch.Tensor, rows: int) -> None:
    codes, scale = torch.randint(-128, 128, (rows, 336), dtype=torch.int8), torch.rand(rows)
    wanted = codes.double() @ narrow.double().T * scale.double()[:, None]
    sizes = codes.double().abs() @ narrow.double().abs().amax(1, keepdim=True).T.expand(336, -1) * scale[:, None]
    y = project_planes(codes, scale, in_planes(narrow.clone()))
    assert y.shape == (rows, 48) and y.dtype == torch.float32
    assert ((y.double() - wanted).abs() <= 4 * HALF_STEP * sizes + 1e-30).all()


def test_only_float32_on_a_cpu_gains() -> None:
    a = torch.zeros(16, 64)
    assert not is_faster_in_planes(a.half()) and not is_faster_in_planes(a.to("meta"))
