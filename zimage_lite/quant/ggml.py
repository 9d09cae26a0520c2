"""ggml's block formats: a row is a sequence of blocks, and a block holds its scales and codes.

`blocks` and `kquants` have the arithmetic. Types that neither knows are unpacked by gguf-py; none can be written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..errors import UserError
from . import blocks, kquants
from .flat import PACK_BEST
from .formats import GGML_TYPES, Codec, Format, Layout, Options, Parts


@dataclass(frozen=True)
class BlockCodec(Codec):
    """Blocks are independent, so the arithmetic sees them as [blocks, elements] and rows do not matter."""

    block: int
    block_bytes: int
    pack: Callable[[Tensor, str], Tensor] | None
    unpack: Callable[[Tensor], Tensor]

    def layout(self, rows: int, columns: int, options: Options) -> Layout:
        return {"": ("U8", (rows, columns // self.block * self.block_bytes))}

    def quantize(self, x: Tensor, options: Options, effort: str = "reference") -> Parts:
        assert self.pack is not None, "the table marks this format as read-only"
        return {"": self.pack(x.reshape(-1, self.block), effort).reshape(x.shape[0], -1)}

    def dequantize(self, parts: Parts, columns: int, options: Options) -> Tensor:
        packed = parts[""].reshape(-1, self.block_bytes)
        return self.unpack(packed).reshape(-1, columns)


def _pack_simple(name: str, x: Tensor, effort: str) -> Tensor:
    if effort == "best":
        return PACK_BEST[name](x)
    if x.device.type == "cpu" and name in ("q8_0", "q4_0"):
        from . import rows_cpu  # half a second of imports

        return rows_cpu.PACK[name](x)
    return blocks.PACK[name](x)


def _unpack_with_gguf_py(name: str) -> Callable[[Tensor], Tensor]:
    def unpack(packed: Tensor) -> Tensor:
        import gguf

        kind = gguf.GGMLQuantizationType(GGML_TYPES[name][0])
        try:
            wide = gguf.dequantize(packed.cpu().numpy(), kind)
        except NotImplementedError as error:
            raise UserError(f"ggml type {name} cannot be unpacked", fix="use a file of another type") from error
        return torch.from_numpy(wide).to(packed.device)

    return unpack


def codec(row: Format) -> BlockCodec:
    _, block, block_bytes = GGML_TYPES[row.name]
    pack = partial(_pack_simple, row.name) if row.name in blocks.PACK else kquants.PACK.get(row.name)
    unpack = blocks.UNPACK.get(row.name) or kquants.UNPACK.get(row.name) or _unpack_with_gguf_py(row.name)
    return BlockCodec(block, block_bytes, pack, unpack)
