"""Rotation and quantization of rows: the kernel against its reference, and what the rotation is for."""

from __future__ import annotations

import pytest
import torch
from activations import DEVICE, assert_same_codes, poisoned, with_outliers  # noqa: F401
from zimage_kernels import linear_int8
from zimage_kernels.quantize import Int8Rows, quantize_rows
from zimage_kernels.rotation import hadamard_rotate

from zimage_lite.quant.formats import FORMATS

pytest.importorskip("triton")


@pytest.mark.slow
def test_kernel_is_the_reference() -> None:
    """Rows of this model's widths, of the demo's, and one that no power of four divides."""
    shapes = [(1, 256, 256), (17, 3840, 256), (129, 256, 256), (3, 10240, 256), (9, 384, 64), (9, 48, 16), (5, 40, 0)]
    xs = [
        (with_outliers(rows, columns, dtype), group)
        for rows, columns, group in shapes
        for dtype in (torch.float16, torch.float32)
    ]
    assert_same_codes(
        [quantize_rows(x, group, "triton") for x, group in xs],
        [quantize_rows(x, group, "reference") for x, group in xs],
    )


def test_codes_are_those_of_comfy_kitchen() -> None:
    """The matrix is theirs, so that weights rotated there and activations rotated here multiply to x W^T."""
    theirs = pytest.importorskip("comfy_kitchen.tensor.int8_utils")
    x = with_outliers(4, 512)
    rotated = (x.double().view(4, 2, 256) @ theirs._build_hadamard(256, DEVICE).double().T).view(4, 512)
    codes, scale = quantize_rows(x, 256, "triton")
    assert ((codes * scale.unsqueeze(1) - rotated).abs() <= scale.unsqueeze(1) * 0.5001).all()
    assert (codes.abs().amax(1) == 127).all()


@pytest.mark.slow
def test_rotated_activations_meet_rotated_weights() -> None:
    """Through the int8 product, with a weight as our converter writes it. Two roundings of Gaussian data to 127 steps
    of a largest value near 4 sigma: sqrt(2) * 4 / 127 / sqrt(12) = 1.3 %. Unrotated codes would be off by 140 %."""
    x, w = with_outliers(17, 512), torch.randn(64, 512)
    codec = FORMATS["int8"].codec
    parts = codec.quantize(w.cpu(), codec.options(512))
    codes, scale = quantize_rows(x, 256, "triton")
    weight, weight_scale = parts[""].to(DEVICE), parts["_scale"].squeeze(1).to(DEVICE)
    y = linear_int8(codes, scale, weight, weight_scale, out_dtype=torch.float32, backend="reference")
    assert (y - x @ w.T).norm() < 0.02 * (x @ w.T).norm()


def test_a_row_of_zeros_stays_zero() -> None:
    x = torch.zeros(3, 256)
    x[1] = 1e-3
    codes, scale = quantize_rows(x, 256, "triton")
    assert codes[0].count_nonzero() == codes[2].count_nonzero() == 0
    assert (scale > 0).all() and scale.isfinite().all()


def test_halves_go_to_the_even_neighbour() -> None:
    """And -128 never appears: the scale is exact here, so are the quotients."""
    x = torch.tensor([[127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert quantize_rows(x, 0, "triton").codes.tolist() == [[127, -127, 0, 2, 2, 0, -2, -2]]


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_rotation_earns_its_place(backend: str) -> None:
    """With planted outliers the scale of an unrotated row fits them alone. A row of [3840] whose largest is 30 sigma
    loses 30/127/sqrt(12) = 7 % of a sigma without rotation; spread over 256, an outlier is 30/16 sigma."""
    x = torch.randn(8, 3840)
    x[:, ::1280] = 30.0
    error = {}
    for group in (0, 256):
        codes, scale = quantize_rows(x, group, backend)  # type: ignore[arg-type]
        back = codes * scale.unsqueeze(1)
        back = hadamard_rotate(back, group) if group else back
        ordinary = x.abs() < 30
        error[group] = (back - x)[ordinary].norm() / x[ordinary].norm()
    assert error[256] < error[0] / 4, error


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="rotation group: got 256 for rows of 384"):
        quantize_rows(torch.zeros(1, 384), 256)
    assert isinstance(quantize_rows(torch.zeros(1, 384), 64), Int8Rows)
