"""ggml's block formats. A block of a row holds its scale (and minimum) as float16, then its codes.

The codes are those of ggml's reference quantizers, bit for bit: they come from the float32 scale, which is rounded to
float16 only for storage. Types that have no codec here are unpacked by gguf-py; none of those can be written.
Layouts: gguf-py's quants.py and ggml-quants.c describe the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .formats import GGML_TYPES, Format, Parts

# The largest float32 below one half: x + copysign(this, x), truncated, rounds half away from zero like C's roundf,
# where adding 0.5 itself would turn 0.49999997 into 1.
_ALMOST_HALF = torch.tensor(0.49999997)


@dataclass(frozen=True)
class BlockCodec:
    """Blocks are independent, so the arithmetic sees them as [blocks, elements] and rows do not matter."""

    block: int
    block_bytes: int
    pack: Callable[[Tensor], Tensor] | None
    unpack: Callable[[Tensor], Tensor]

    def options(self, columns: int) -> Mapping[str, Any]:
        return {}

    def quantize(self, x: Tensor, options: Mapping[str, Any]) -> Parts:
        assert self.pack is not None, "the table marks this format as read-only"
        return {"": self.pack(x.reshape(-1, self.block)).reshape(x.shape[0], -1)}

    def dequantize(self, parts: Parts, columns: int, options: Mapping[str, Any]) -> Tensor:
        blocks = parts[""].reshape(-1, self.block_bytes)
        return self.unpack(blocks).reshape(-1, columns)


def _reciprocal(d: Tensor) -> Tensor:
    """1/d, and 0 for a block of zeros."""
    return torch.where(d == 0, 0.0, 1.0 / d)


def _half_bytes(*scales: Tensor) -> Tensor:
    """Each [blocks, 1] float32 -> [blocks, 2 * len] bytes of float16."""
    return torch.cat(scales, dim=1).half().view(torch.uint8)


def _scale(blocks: Tensor, at: int = 0) -> Tensor:
    """The float16 at byte `at` of every block -> [blocks, 1] float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _pack_nibbles(codes: Tensor) -> Tensor:
    """[blocks, 32] uint8 below 16 -> [blocks, 16]: element j in the low nibble, element j + 16 in the high one."""
    return codes[:, :16] | (codes[:, 16:] << 4)


def _unpack_nibbles(packed: Tensor) -> Tensor:
    return torch.cat((packed & 15, packed >> 4), dim=1)


def _pack_q8_0(x: Tensor) -> Tensor:
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    d = torch.maximum(high, -low).abs_() / 127  # a block of -0 has the scale +0
    scaled = x * _reciprocal(d)
    codes = scaled.add_(torch.copysign(_ALMOST_HALF, scaled)).to(torch.int8)
    return torch.cat((_half_bytes(d), codes.view(torch.uint8)), dim=1)


def _unpack_q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8) * _scale(blocks)


def _pack_q4_0(x: Tensor) -> Tensor:
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    extreme = torch.where(high > -low, high, low)
    tied = (high == -low).squeeze(1) & (high != 0).squeeze(1)
    if tied.any():  # of +m and -m, ggml takes whichever comes first
        rows = x[tied]
        extreme[tied] = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    d = extreme / -8
    codes = (x * _reciprocal(d)).add_(8.5).clamp_(max=15).to(torch.uint8)
    return torch.cat((_half_bytes(d), _pack_nibbles(codes)), dim=1)


def _unpack_q4_0(blocks: Tensor) -> Tensor:
    return _unpack_nibbles(blocks[:, 2:]).float().sub_(8).mul_(_scale(blocks))


def _pack_q4_1(x: Tensor) -> Tensor:
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    d = (high - low) / 15
    codes = ((x - low) * _reciprocal(d)).add_(0.5).clamp_(max=15).to(torch.uint8)
    return torch.cat((_half_bytes(d, low), _pack_nibbles(codes)), dim=1)


def _unpack_q4_1(blocks: Tensor) -> Tensor:
    return _unpack_nibbles(blocks[:, 4:]).float().mul_(_scale(blocks)).add_(_scale(blocks, at=2))


_OWN = {
    "q8_0": (_pack_q8_0, _unpack_q8_0),
    "q4_0": (_pack_q4_0, _unpack_q4_0),
    "q4_1": (_pack_q4_1, _unpack_q4_1),
}


def _unpack_with_gguf_py(name: str) -> Callable[[Tensor], Tensor]:
    def unpack(blocks: Tensor) -> Tensor:
        import gguf

        kind = gguf.GGMLQuantizationType(GGML_TYPES[name][0])
        try:
            wide = gguf.dequantize(blocks.cpu().numpy(), kind)
        except NotImplementedError as error:
            raise UserError(f"ggml type {name} cannot be unpacked", fix="use a file of another type") from error
        return torch.from_numpy(wide).to(blocks.device)

    return unpack


def codec(row: Format) -> BlockCodec:
    pack, unpack = _OWN.get(row.name, (None, None))
    return BlockCodec(row.block, row.block_bytes, pack, unpack or _unpack_with_gguf_py(row.name))
