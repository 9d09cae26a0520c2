"""RMSNorm with the residual in front: the kernel against its reference, and both against float64."""

from __future__ import annotations

import pytest
import torch
from activations import assert_accurate, assert_same_codes, poisoned, with_outliers  # noqa: F401
from torch import Tensor
from zimage_kernels.norm import Branch, Norm, add_norm
from zimage_kernels.quantize import Int8Rows

pytest.importorskip("triton")

EPS = 1e-5
SHAPES = [(1, 256), (17, 3840), (129, 256)]


def _vector(dim: int, dtype: torch.dtype) -> Tensor:
    return (1 + 0.3 * torch.randn(dim)).to(dtype)


def _inputs(rows: int, dim: int, stream: torch.dtype, dtype: torch.dtype) -> tuple[Tensor, Branch, Norm]:
    vectors = [_vector(dim, dtype) for _ in range(4)]
    branch = Branch(with_outliers(rows, dim, dtype), vectors[0], vectors[1].tanh(), EPS)
    return with_outliers(rows, dim, stream), branch, Norm(vectors[2], vectors[3], EPS)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [torch.float16, torch.float32])
def test_int8_is_the_reference(stream: torch.dtype) -> None:
    """The sums that come out beside the codes may be a rounding apart."""
    results: dict[str, list[Int8Rows]] = {"triton": [], "reference": []}
    for rows, dim, gated, branched in (
        (1, 256, 1, 1),
        (17, 3840, 1, 1),
        (129, 256, 1, 1),
        (3, 384, 0, 1),
        (3, 3840, 0, 0),
    ):
        x, branch, norm = _inputs(rows, dim, stream, torch.float16)
        given = (branch if gated else branch._replace(gate=None)) if branched else None
        totals = []
        for backend, into in results.items():
            total, h = add_norm(x, given, norm, 64 if dim == 384 else 256, backend)  # type: ignore[arg-type]
            assert isinstance(h, Int8Rows)
            into.append(h)
            totals.append(total)
        torch.testing.assert_close(*totals, rtol=2 * torch.finfo(stream).eps, atol=1e-5)
    assert_same_codes(results["triton"], results["reference"])


def _in_float64(x: Tensor, branch: Branch, norm: Norm) -> tuple[Tensor, Tensor]:
    """Written out again, from the paper and not from the reference."""

    def rms(x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()

    assert branch.gate is not None and norm.scale is not None
    total = x.double() + branch.gate.double() * rms(branch.y.double()) * branch.weight.double()
    return total, rms(total) * norm.weight.double() * norm.scale.double()


@pytest.mark.parametrize(("rows", "dim"), SHAPES)
@pytest.mark.parametrize(("stream", "dtype"), [(torch.float16, torch.float16), (torch.float32, torch.float16)])
def test_16_bits_are_as_accurate_as_torch(rows: int, dim: int, stream: torch.dtype, dtype: torch.dtype) -> None:
    x, branch, norm = _inputs(rows, dim, stream, dtype)
    total, h = add_norm(x, branch, norm, None, "triton")
    torch_total, torch_h = add_norm(x, branch, norm, None, "reference")
    true_total, true_h = _in_float64(x, branch, norm)
    assert isinstance(h, Tensor) and isinstance(torch_h, Tensor)
    assert_accurate(total, torch_total, true_total)
    assert_accurate(h, torch_h, true_h)
    assert_accurate(torch_h, true_h.to(dtype), true_h)  # the reference itself rounds about once


def test_a_scaled_branch_gives_the_same_as_one_that_float16_cannot_hold() -> None:
    """y computed as 2^-7 of its value, with eps of 4^-7: the power of two cancels exactly. eps matters here."""
    x, branch, norm = _inputs(5, 256, torch.float32, torch.float16)
    y = branch.y.float() * 2.0**-8
    plain = add_norm(x, branch._replace(y=y), norm, 256, "triton")
    scaled = add_norm(x, branch._replace(y=y * 2.0**-7, scale_log2=-7), norm, 256, "triton")
    assert torch.equal(plain.x, scaled.x)
    assert isinstance(plain.h, Int8Rows) and isinstance(scaled.h, Int8Rows)
    assert torch.equal(plain.h.codes, scaled.h.codes)
    unscaled_eps = add_norm(x, branch._replace(y=y * 2.0**-7), norm, 256, "triton")
    assert not torch.equal(plain.x, unscaled_eps.x)


def test_the_fused_pass_is_two_passes() -> None:
    x, branch, norm = _inputs(3, 384, torch.float16, torch.float16)
    total = add_norm(x, branch, None, None, "triton")
    assert total.h is None
    fused, second = add_norm(x, branch, norm, 64, "triton"), add_norm(total.x, None, norm, 64, "triton")
    assert torch.equal(fused.x, total.x)
    assert isinstance(fused.h, Int8Rows) and isinstance(second.h, Int8Rows)
    assert torch.equal(fused.h.codes, second.h.codes) and torch.equal(fused.h.scale, second.h.scale)


def test_the_input_is_kept() -> None:
    x, branch, norm = _inputs(2, 256, torch.float32, torch.float16)
    before = x.clone()
    assert not torch.equal(add_norm(x, branch, norm, 256, "triton").x, before)
    assert torch.equal(x, before)
