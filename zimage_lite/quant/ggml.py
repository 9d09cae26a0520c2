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
from . import blocks, flat, kquants
from .cells import Cells
from .compensate import compensated
from .formats import GGML_TYPES, Codec, Format, Layout, Options, Parts
from .importance import Importance
from .inputs import Inputs
from .klayouts import PACK_BITS
from .loops import loops
from .refine import compiled


@dataclass(frozen=True)
class BlockCodec(Codec):
    """Blocks are independent, so the arithmetic sees them as [blocks, elements] and rows do not matter."""

    name: str
    block: int
    block_bytes: int
    pack: Callable[..., Tensor] | None
    unpack: Callable[[Tensor], Tensor]

    def layout(self, rows: int, columns: int, options: Options) -> Layout:
        return {"": ("U8", (rows, columns // self.block * self.block_bytes))}

    def quantize(self, x: Tensor, options: Options, effort: str = "reference", inputs: Inputs | None = None) -> Parts:
        assert self.pack is not None, "the table marks this format as read-only"
        if inputs is not None and inputs.hessian is not None and effort == "best":
            return {"": self._compensated(x, inputs)}
        importance = None if inputs is None else Importance.of(self.name, x, inputs.squares, self.block)
        blocks = x.reshape(-1, self.block)
        return {"": self.pack(blocks, effort, importance=importance).reshape(x.shape[0], -1)}

    def _compensated(self, x: Tensor, inputs: Inputs) -> Tensor:
        found = compensated(x, inputs, self.block, self._cells)
        encode = partial(flat.bits, self.name) if self.name in flat.GRIDS else PACK_BITS[self.name]
        return torch.cat([encode(cells.scales, cells.codes.t().contiguous()) for cells in found], dim=1)

    def _cells(self, number: int, block: Tensor, counted: Tensor) -> Cells:
        """Whose scales are searched when the errors of the blocks before it have been made up for in it."""
        searches, importance = compiled(block), Importance.of(self.name, block, counted, self.block)
        if self.name in flat.GRIDS:
            grid, scales = flat.GRIDS[self.name], flat.scales_of(self.name, searches, block, importance)
        else:
            grid = kquants.GRIDS[self.name]
            scales, _ = kquants.scales_of(self.name, searches, block, "best", importance)
        return Cells(grid, self.block, scales)

    def dequantize(self, parts: Parts, columns: int, options: Options) -> Tensor:
        packed = parts[""].reshape(-1, self.block_bytes)
        return self.unpack(packed).reshape(-1, columns)


def _pack_simple(name: str, x: Tensor, effort: str, importance: Importance | None) -> Tensor:
    if effort == "best":
        return flat.PACK_BEST[name](x, importance=importance)
    if importance is not None and name != "q8_0":  # of which ggml takes no notice there
        return flat.pack_weighted(name, x, importance)
    if x.device.type == "cpu" and name in ("q8_0", "q4_0"):
        packed: Tensor = loops("rows_cpu").PACK[name](x)
        return packed
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
    return BlockCodec(row.name, block, block_bytes, pack, unpack)
