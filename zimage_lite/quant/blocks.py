"""ggml's blocks of 32 with one scale (and minimum): q8_0, q4_0, q4_1, q5_0, q5_1.

The codes are those of ggml's reference quantizers, bit for bit: they come from the float32 scale, which is rounded to
float16 only for storage. Layouts: gguf-py's quants.py and ggml-quants.c describe the same bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import half_bytes, join_bits, read_half, split_bits

# The largest float32 below one half: x + copysign(this, x), truncated, rounds half away from zero like C's roundf,
# where adding 0.5 itself would turn 0.49999997 into 1.
_ALMOST_HALF = torch.tensor(0.49999997)


def _divide(x: Tensor, by: int) -> Tensor:
    """x / by, where CUDA would multiply by the reciprocal of a Python number."""
    return x / torch.full_like(x, by)


def _reciprocal(d: Tensor) -> Tensor:
    """1/d, and 0 for a block of zeros."""
    return torch.where(d == 0, 0.0, 1.0 / d)


def _pack_nibbles(codes: Tensor) -> Tensor:
    """[blocks, 32] uint8 below 16 -> [blocks, 16]: element j in the low nibble, element j + 16 in the high one."""
    return codes[:, :16] | (codes[:, 16:] << 4)


def _unpack_nibbles(packed: Tensor) -> Tensor:
    return torch.cat((packed & 15, packed >> 4), dim=1)


def _pack_q8_0(x: Tensor) -> Tensor:
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    d = _divide(torch.maximum(high, -low).abs_(), 127)  # a block of -0 has the scale +0
    scaled = x * _reciprocal(d)
    codes = scaled.add_(torch.copysign(_ALMOST_HALF, scaled)).to(torch.int8)
    return torch.cat((half_bytes(d), codes.view(torch.uint8)), dim=1)


def _unpack_q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8) * read_half(blocks, 0)


def _pack_q4_0(x: Tensor) -> Tensor:
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    extreme = torch.where(high > -low, high, low)
    tied = (high == -low).squeeze(1) & (high != 0).squeeze(1)
    if tied.any():  # of +m and -m, ggml takes whichever comes first
        rows = x[tied]
        extreme[tied] = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    d = extreme / -8  # exact by either way
    codes = (x * _reciprocal(d)).add_(8.5).clamp_(max=15).to(torch.uint8)
    return torch.cat((half_bytes(d), _pack_nibbles(codes)), dim=1)


def _unpack_q4_0(blocks: Tensor) -> Tensor:
    return _unpack_nibbles(blocks[:, 2:]).float().sub_(8).mul_(read_half(blocks, 0))


def _pack_q4_1(x: Tensor) -> Tensor:
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    d = _divide(high - low, 15)
    codes = ((x - low) * _reciprocal(d)).add_(0.5).clamp_(max=15).to(torch.uint8)
    return torch.cat((half_bytes(d, low), _pack_nibbles(codes)), dim=1)


def _unpack_q4_1(blocks: Tensor) -> Tensor:
    return _unpack_nibbles(blocks[:, 4:]).float().mul_(read_half(blocks, 0)).add_(read_half(blocks, 2))


def pack_codes(codes: Tensor) -> Tensor:
    """[blocks, 32] uint8 below 32 -> [blocks, 20]: the mask of the fifth bits, then the nibbles."""
    mask = join_bits((codes >> 4).reshape(-1, 4, 8).transpose(1, 2), 1)  # bit i of the mask is element i
    return torch.cat((mask, join_bits((codes & 15).reshape(-1, 2, 16), 4)), dim=1)


def _unpack_codes(packed: Tensor) -> Tensor:
    fifth = split_bits(packed[:, :4], 1).transpose(1, 2).reshape(-1, 32)
    return split_bits(packed[:, 4:], 4).reshape(-1, 32) | (fifth << 4)


def _pack_q5_0(x: Tensor) -> Tensor:
    extreme = x.gather(1, x.abs().argmax(1, keepdim=True)) + 0.0  # a block of -0 has the scale of one of +0
    d = extreme / -16
    codes = (x * _reciprocal(d)).add_(16.5).clamp_(max=31).to(torch.uint8)
    return torch.cat((half_bytes(d), pack_codes(codes)), dim=1)


def _unpack_q5_0(blocks: Tensor) -> Tensor:
    return _unpack_codes(blocks[:, 2:]).float().sub_(16).mul_(read_half(blocks, 0))


def _pack_q5_1(x: Tensor) -> Tensor:
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    d = _divide(high - low, 31)
    codes = ((x - low) * _reciprocal(d)).add_(0.5).clamp_(max=31).to(torch.uint8)
    return torch.cat((half_bytes(d, low), pack_codes(codes)), dim=1)


def _unpack_q5_1(blocks: Tensor) -> Tensor:
    return _unpack_codes(blocks[:, 4:]).float().mul_(read_half(blocks, 0)).add_(read_half(blocks, 2))


PACK = {"q8_0": _pack_q8_0, "q4_0": _pack_q4_0, "q4_1": _pack_q4_1, "q5_0": _pack_q5_0, "q5_1": _pack_q5_1}
UNPACK = {"q8_0": _unpack_q8_0, "q4_0": _unpack_q4_0, "q4_1": _unpack_q4_1, "q5_0": _unpack_q5_0, "q5_1": _unpack_q5_1}
