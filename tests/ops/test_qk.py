"""Queries and keys: the kernel against its reference, diffusers' own norm and RoPE, and what the shift is for."""

from __future__ import annotations

import pytest
import torch
from activations import assert_accurate, assert_same_codes, poisoned, with_outliers  # noqa: F401
from torch import Tensor
from zimage_kernels.qk import SAMPLES, norm_rope, norm_rope_reference, sample_step
from zimage_kernels.quantize import Int8Rows

pytest.importorskip("triton")

EPS = 1e-5
HEADS, DIM = 3, 128


def _inputs(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q and k as views of the fused projection, weight, cos, sin. Keys have a channel far from zero, as real ones."""
    qkv = with_outliers(tokens, 3 * HEADS * DIM)
    qkv[:, HEADS * DIM + 5 :: DIM] += 20
    q, k, _ = (part.unflatten(1, (HEADS, DIM)) for part in qkv.to(dtype).chunk(3, dim=1))
    angles = torch.rand(tokens, DIM // 2) * 6
    angles[:, : DIM // 4] *= 0.05
    return q, k, (1 + 0.3 * torch.randn(DIM)).to(dtype), angles.cos(), angles.sin()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_int8_is_the_reference(dtype: torch.dtype) -> None:
    ours, expected = [], []
    for lengths in ([1], [17], [20, 109], [2 * SAMPLES + 9]):
        q, k, *rest = _inputs(sum(lengths), dtype)
        cases = [(q, 0, None), (q, 64, None), (k, 64, lengths)]
        for x, group, centre in cases if sum(lengths) < SAMPLES else [(k[:, :1], 0, lengths)]:
            for backend, into in (("triton", ours), ("reference", expected)):
                rows = norm_rope(x, *rest, EPS, group, centre, backend)  # type: ignore[arg-type]
                assert isinstance(rows, Int8Rows)
                assert rows.codes.is_contiguous() and rows.scale.shape == x.shape[:2]
                into.append(rows)
    assert_same_codes(ours, expected)


@pytest.mark.parametrize("tokens", [1, 17, 129])
def test_16_bits_are_as_accurate_as_torch(tokens: int) -> None:
    q, _, weight, cos, sin = _inputs(tokens, torch.float16)
    truth = q.double() / (q.double().pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    pairs = torch.view_as_complex(truth.unflatten(-1, (-1, 2))) * torch.complex(cos, sin).unsqueeze(1)
    truth = torch.view_as_real(pairs).flatten(-2)
    ours, torchs = (norm_rope(q, weight, cos, sin, EPS, backend=name) for name in ("triton", "reference"))  # type: ignore[arg-type]
    assert isinstance(ours, Tensor) and isinstance(torchs, Tensor)
    assert_accurate(ours, torchs, truth)
    assert_accurate(torchs, truth.half(), truth)


def test_heads_are_where_diffusers_has_them() -> None:
    """Against diffusers' RMSNorm and the RoPE of its attention processor, in float32."""
    from diffusers.models.normalization import RMSNorm

    q, _, weight, cos, sin = _inputs(9, torch.float32)
    q = q[:, :2]  # two heads are not shared by three programs
    norm = RMSNorm(DIM, eps=EPS)
    norm.weight.data = weight
    pairs = torch.view_as_complex(norm(q).reshape(9, 2, -1, 2)) * torch.complex(cos, sin).unsqueeze(1)
    ours = norm_rope(q, weight, cos, sin, EPS, backend="triton")
    torch.testing.assert_close(ours, torch.view_as_real(pairs).flatten(2).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_shift_changes_no_softmax_and_shrinks_its_error() -> None:
    """Each sequence has its own shift, which adds one number to all its logits of a query and head. Keys have one
    channel 12 sigma from zero, in a pair that turns slowly: it alone makes their range 3 times as large."""
    lengths = [40, 89]
    q, k = torch.randn(2, sum(lengths), HEADS, DIM)
    k[..., 0] += 12
    angles = torch.rand(sum(lengths), DIM // 2) * 6
    angles[:, 0] *= 0.02
    rest = (torch.ones(DIM), angles.cos(), angles.sin(), EPS)
    query, key = norm_rope_reference(q, *rest), norm_rope_reference(k, *rest)
    assert isinstance(query, Tensor) and isinstance(key, Tensor)

    def softmaxes(keys: Tensor) -> list[Tensor]:
        pairs = zip(query.split(lengths), keys.split(lengths), strict=True)
        return [torch.einsum("qhd,khd->hqk", a, b).mul(DIM**-0.5).softmax(-1) for a, b in pairs]

    error = {}
    for name, centre in (("plain", None), ("shifted", lengths)):
        rows = norm_rope(k, *rest, 0, centre, "triton")
        assert isinstance(rows, Int8Rows)
        ours = softmaxes(rows.codes * rows.scale.unsqueeze(-1))
        differences = [(a - b).norm() / b.norm() for a, b in zip(ours, softmaxes(key), strict=True)]
        error[name] = torch.stack(differences).max()
    assert error["shifted"] < error["plain"] / 2, error
    assert error["shifted"] < 0.01


def test_samples_cover_the_sequence() -> None:
    for length in (1, SAMPLES - 1, SAMPLES, 4224, 16512):
        count = len(range(0, length, sample_step(length)))
        assert min(length, SAMPLES) <= count < 2 * SAMPLES
