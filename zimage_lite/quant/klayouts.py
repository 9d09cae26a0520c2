"""Where ggml's K-quants and IQ4 types keep their bits: what the quantizers write, and the way back to weights.

A super-block has 256 elements in 8 or 16 sub-blocks. Codes are stored as unsigned numbers, [blocks, 256] uint8; the
scales of the sub-blocks as ggml's integers, [blocks, 8 or 16], times one float16 scale d (and dmin for the minima).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .bits import half_bytes, join_bits, read_half, split_bits
from .search import IQ4_VALUES


class Scales(NamedTuple):
    """An element is d * sc * code - dmin * mn. d, dmin: [blocks, 1]; sc, mn: [blocks, sub-blocks]; all float32."""

    d: Tensor
    sc: Tensor
    dmin: Tensor
    mn: Tensor


def _bytes(integers: Tensor) -> Tensor:
    return integers.to(torch.int16).to(torch.uint8)


def _two_bits(codes: Tensor) -> Tensor:
    return join_bits(codes.view(-1, 2, 4, 32), 2).reshape(-1, 64)


def _split_two_bits(packed: Tensor) -> Tensor:
    return split_bits(packed.reshape(-1, 2, 32), 2).reshape(-1, 256)


def _six_bits(sc: Tensor, mn: Tensor) -> Tensor:
    """Eight scales and eight minima below 64 -> 12 bytes; the upper halves' top bits fill up the lower halves."""
    sc, mn = _bytes(sc), _bytes(mn)
    sc_low, sc_high, mn_low, mn_high = sc[:, :4], sc[:, 4:], mn[:, :4], mn[:, 4:]
    parts = (sc_low | (sc_high >> 4 << 6), mn_low | (mn_high >> 4 << 6), (sc_high & 15) | ((mn_high & 15) << 4))
    return torch.cat(parts, dim=1)


def _split_six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    low, middle, last = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    sc = torch.cat((low & 63, (last & 15) | (low >> 6 << 4)), dim=1)
    mn = torch.cat((middle & 63, (last >> 4) | (middle >> 6 << 4)), dim=1)
    return sc, mn


def _affine(blocks: Tensor, at: int, sc: Tensor, mn: Tensor, codes: Tensor) -> Tensor:
    n = 256 // sc.shape[1]
    scale, minimum = read_half(blocks, at) * sc, read_half(blocks, at + 2) * mn
    wide = codes.float().view(-1, sc.shape[1], n)
    return wide.mul_(scale.unsqueeze(2)).sub_(minimum.unsqueeze(2)).view(-1, 256)


def _symmetric(blocks: Tensor, at: int, sc: Tensor, values: Tensor) -> Tensor:
    scale = read_half(blocks, at) * sc
    return values.view(-1, sc.shape[1], 256 // sc.shape[1]).mul_(scale.unsqueeze(2)).view(-1, 256)


def _pack_q2_k(s: Scales, codes: Tensor) -> Tensor:
    return torch.cat((_bytes(s.sc) | (_bytes(s.mn) << 4), _two_bits(codes), half_bytes(s.d, s.dmin)), dim=1)


def _unpack_q2_k(blocks: Tensor) -> Tensor:
    return _affine(blocks, 80, blocks[:, :16] & 15, blocks[:, :16] >> 4, _split_two_bits(blocks[:, 16:80]))


def _pack_q3_k(s: Scales, codes: Tensor) -> Tensor:
    high = join_bits((codes >> 2).view(-1, 8, 32), 1)
    sc = _bytes(s.sc + 32)
    low_bits = join_bits((sc & 15).view(-1, 2, 8), 4)
    high_bits = join_bits((sc >> 4).view(-1, 4, 4), 2)
    return torch.cat((high, _two_bits(codes & 3), low_bits, high_bits, half_bytes(s.d)), dim=1)


def _unpack_q3_k(blocks: Tensor) -> Tensor:
    high = split_bits(blocks[:, :32], 1).reshape(-1, 256)
    low_bits = split_bits(blocks[:, 96:104], 4).reshape(-1, 16)
    high_bits = split_bits(blocks[:, 104:108], 2).reshape(-1, 16)
    sc = (low_bits | (high_bits << 4)).float().sub_(32)
    values = (_split_two_bits(blocks[:, 32:96]) | (high << 2)).float().sub_(4)
    return _symmetric(blocks, 108, sc, values)


def _nibbles(codes: Tensor) -> Tensor:
    return join_bits(codes.view(-1, 4, 2, 32), 4).reshape(-1, 128)


def _split_nibbles(packed: Tensor) -> Tensor:
    return split_bits(packed.reshape(-1, 4, 32), 4).reshape(-1, 256)


def _pack_q4_k(s: Scales, codes: Tensor) -> Tensor:
    return torch.cat((half_bytes(s.d, s.dmin), _six_bits(s.sc, s.mn), _nibbles(codes)), dim=1)


def _unpack_q4_k(blocks: Tensor) -> Tensor:
    return _affine(blocks, 0, *_split_six_bits(blocks[:, 4:16]), _split_nibbles(blocks[:, 16:]))


def _pack_q5_k(s: Scales, codes: Tensor) -> Tensor:
    fifth = join_bits((codes >> 4).view(-1, 8, 32), 1)
    return torch.cat((half_bytes(s.d, s.dmin), _six_bits(s.sc, s.mn), fifth, _nibbles(codes & 15)), dim=1)


def _unpack_q5_k(blocks: Tensor) -> Tensor:
    fifth = split_bits(blocks[:, 16:48], 1).reshape(-1, 256)
    codes = _split_nibbles(blocks[:, 48:]) | (fifth << 4)
    return _affine(blocks, 0, *_split_six_bits(blocks[:, 4:16]), codes)


def _pack_q6_k(s: Scales, codes: Tensor) -> Tensor:
    low = join_bits((codes & 15).view(-1, 2, 2, 64), 4).reshape(-1, 128)
    high = join_bits((codes >> 4).view(-1, 2, 4, 32), 2).reshape(-1, 64)
    return torch.cat((low, high, _bytes(s.sc), half_bytes(s.d)), dim=1)


def _unpack_q6_k(blocks: Tensor) -> Tensor:
    low = split_bits(blocks[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 256)
    high = split_bits(blocks[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 256)
    sc = blocks[:, 192:208].contiguous().view(torch.int8)
    return _symmetric(blocks, 208, sc, (low | (high << 4)).float().sub_(32))


def _pack_iq4_nl(s: Scales, codes: Tensor) -> Tensor:
    return torch.cat((half_bytes(s.d), join_bits(codes.view(-1, 2, 16), 4)), dim=1)


def _values(codes: Tensor) -> Tensor:
    return torch.tensor(IQ4_VALUES, dtype=torch.float32, device=codes.device)[codes.int()]


def _unpack_iq4_nl(blocks: Tensor) -> Tensor:
    return _values(split_bits(blocks[:, 2:], 4).reshape(-1, 32)).mul_(read_half(blocks, 0))


def _pack_iq4_xs(s: Scales, codes: Tensor) -> Tensor:
    sc = _bytes(s.sc + 32)
    high = join_bits((sc >> 4).view(-1, 2, 4, 1), 2).reshape(-1, 2)
    low = join_bits((sc & 15).view(-1, 4, 2, 1), 4).reshape(-1, 4)
    nibbles = join_bits(codes.view(-1, 8, 2, 16), 4).reshape(-1, 128)
    return torch.cat((half_bytes(s.d), high, low, nibbles), dim=1)


def _unpack_iq4_xs(blocks: Tensor) -> Tensor:
    high = split_bits(blocks[:, 2:4, None], 2).reshape(-1, 8)
    low = split_bits(blocks[:, 4:8, None], 4).reshape(-1, 8)
    sc = (low | (high << 4)).float().sub_(32)
    return _symmetric(blocks, 0, sc, _values(split_bits(blocks[:, 8:].reshape(-1, 8, 16), 4).reshape(-1, 256)))


PACK_BITS: dict[str, Callable[[Scales, Tensor], Tensor]] = {
    "q2_k": _pack_q2_k, "q3_k": _pack_q3_k, "q4_k": _pack_q4_k, "q5_k": _pack_q5_k, "q6_k": _pack_q6_k,
    "iq4_nl": _pack_iq4_nl, "iq4_xs": _pack_iq4_xs,
}  # fmt: skip
UNPACK: dict[str, Callable[[Tensor], Tensor]] = {
    "q2_k": _unpack_q2_k, "q3_k": _unpack_q3_k, "q4_k": _unpack_q4_k, "q5_k": _unpack_q5_k, "q6_k": _unpack_q6_k,
    "iq4_nl": _unpack_iq4_nl, "iq4_xs": _unpack_iq4_xs,
}  # fmt: skip
