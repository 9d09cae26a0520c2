"""Flash attention against float64, held to twice the error of torch in the same dtype."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from activations import DEVICE, poisoned  # noqa: F401
from torch import Tensor
from zimage_kernels import attention, attention_int8, attention_int8_reference, flash_attention

# Around the tiles of 128 queries and 64 keys; several sequences, one of them empty.
LENGTHS = [[1], [17], [64, 65], [129], [37, 1, 0, 130]]

pytest.importorskip("triton")


def fused_qkv(lengths: list[int], heads: int = 2) -> list[Tensor]:
    """Views into one tensor, as the projection writes it. A few channels and one token stand out, as they do there."""
    qkv = torch.randn(sum(lengths), 3, heads, 128, device=DEVICE)
    qkv[..., ::50] *= 4
    qkv[len(qkv) // 2] *= 3
    return list(qkv.half().unbind(1))


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scales [tokens, heads], in which the tokens of a head lie side by side."""
    scale = (x.float().abs().amax(-1) / 127).T.contiguous().T
    return (x / scale[..., None]).round().clamp(-127, 127).char(), scale


def exact(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """By the formula, in float64."""
    out = []
    for q_i, k_i, v_i in zip(*(t.double().transpose(0, 1).split(lengths, 1) for t in (q, k, v)), strict=True):
        out.append(torch.softmax(q_i @ k_i.mT / math.sqrt(128), -1) @ v_i)
    return torch.cat(out, 1).transpose(0, 1)


def assert_accurate(ours: Tensor, torchs: Tensor, truth: Tensor) -> None:
    error, allowed = ((t.double() - truth).abs() for t in (ours, torchs))
    assert error.max() <= 2 * allowed.max()
    assert error.norm() <= 2 * allowed.norm()


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_16_bit(lengths: list[int]) -> None:
    q, k, v = fused_qkv(lengths)
    y = flash_attention(q, k, v, lengths, backend="triton")
    assert y.dtype == v.dtype and y.is_contiguous()
    assert_accurate(y, attention(q, k, v, lengths), exact(q, k, v, lengths))


@pytest.mark.parametrize(
    ("lengths", "heads", "float16_sums"),
    [*((lengths, 2, False) for lengths in LENGTHS), ([1152], 1, False), ([17], 2, True), ([37, 130], 2, True)],
    ids=str,
)
def test_int8(lengths: list[int], heads: int, float16_sums: bool) -> None:
    """Quantization is the producer's error, not the kernel's: the truth has the same codes and scales."""
    q, k, v = fused_qkv(lengths, heads)
    (q, q_scale), (k, k_scale) = quantized(q), quantized(k)
    truth = exact(q.double() * q_scale[..., None], k.double() * k_scale[..., None], v, lengths)
    y = attention_int8(q, q_scale, k, k_scale, v, lengths, float16_sums, backend="triton")
    assert y.dtype == v.dtype and y.is_contiguous()
    assert_accurate(y, attention_int8_reference(q, q_scale, k, k_scale, v, lengths), truth)


def test_scales_may_lie_by_tokens() -> None:
    q, k, v = fused_qkv([70])
    (q, q_scale), (k, k_scale) = quantized(q), quantized(k)
    y = attention_int8(q, q_scale, k, k_scale, v, [70], backend="triton")
    by_tokens = (scale.contiguous() for scale in (q_scale, k_scale))
    transposed = [value for pair in zip((q, k), by_tokens, strict=True) for value in pair]
    assert torch.equal(attention_int8(*transposed, v, [70], backend="triton"), y)


def test_a_query_of_zeros_takes_the_mean() -> None:
    """Its scale is 0 where nothing clamps it. Fewer keys than a tile, so that some are absent."""
    _, k, v = fused_qkv([70])
    (k, k_scale), zeros = quantized(k), torch.zeros(2, 70, device=DEVICE).T
    y = attention_int8(torch.zeros_like(k), zeros, k, k_scale, v, [70], backend="triton")
    torch.testing.assert_close(y.double(), v.double().mean(0).expand_as(y), rtol=2**-10, atol=2**-10)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "head_dim": ({"q": torch.zeros(4, 2, 64).half()}, r"q: got \[4, 2, 64\], expected \[tokens, heads, 128\]"),
    "dtype": ({"k": torch.zeros(4, 2, 128)}, "k: got torch.float32, expected torch.float16 or torch.bfloat16"),
    "mixed": ({"v": torch.zeros(4, 2, 128).bfloat16()}, "v: got torch.bfloat16"),
    "strides": ({"k": torch.zeros(2, 4, 128).half().transpose(0, 1)}, "k: got strides .* expected dense heads"),
    "lengths": ({"lengths": [3]}, r"lengths: got \[3\], expected tokens of each sequence, 4 in all"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_operands_are_refused(name: str) -> None:
    changed, message = WRONG[name]
    right = {**dict.fromkeys("qkv", torch.ones(4, 2, 128).half()), "lengths": [4]}
    assert torch.equal(flash_attention(**right, backend="reference"), right["v"])
    with pytest.raises(ValueError, match=message):
        flash_attention(**(right | changed))
