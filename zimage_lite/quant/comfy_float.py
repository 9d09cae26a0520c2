"""ComfyUI's 8- and 4-bit floats: `fp8`, `fp8_e5m2`, `mxfp8` and `nvfp4`.

fp8    one float32 scale for the tensor, max|w| / 448 (e5m2: / 57344); other programs also write one for each row
mxfp8  32 columns of a row share a power of two, stored as its exponent plus 127
nvfp4  16 columns share an e4m3 scale, all of them a float32 one; a byte holds an even column in its high nibble

The block scales of mxfp8 and nvfp4 lie as cuBLAS wants them: tiles of 128 rows x 4 blocks of 512 bytes, in which
row r is at (r % 32) * 16 + r // 32 * 4. So rows can be cut at multiples of 128 only. Source: comfy-kitchen 0.2.40.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..units import round_up
from .formats import Codec, Format, Layout, Options, Parts, Shapes
from .inputs import Inputs
from .pieces import by_pieces, from_float8, largest, unpack_nibbles, widen
from .tensor import TORCH_DTYPES

TILE_ROWS, TILE_BLOCKS = 128, 4
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Fp8Codec(Codec):
    dtype: str = "F8_E4M3"

    def marker(self, options: Options) -> dict[str, Any]:
        return {"format": "float8_e4m3fn" if self.dtype == "F8_E4M3" else "float8_e5m2"}

    def layout(self, rows: int, columns: int, options: Options) -> Layout:
        """options: {"per_row": True} where rows have scales of their own, which is only ever read."""
        return {"": (self.dtype, (rows, columns)), "_scale": ("F32", (rows, 1) if options.get("per_row") else ())}

    def quantize(self, x: Tensor, options: Options, effort: str = "reference", inputs: Inputs | None = None) -> Parts:
        """The bytes of comfy-kitchen's TensorCoreFP8Layout, which multiplies by 1 / scale."""
        dtype = TORCH_DTYPES[self.dtype]
        limit = torch.finfo(dtype).max
        scale = largest(x) / limit
        scale = torch.where(scale > 0, scale.clamp(min=1e-30), 1.0)
        factor = 1.0 / scale

        def cast(piece: slice) -> Parts:
            return {"": (x[piece] * factor).clamp_(-limit, limit).to(dtype)}

        return {**by_pieces(x.shape[0], x.shape[1], cast), "_scale": scale}

    def dequantize(self, parts: Parts, columns: int, options: Options) -> Tensor:
        codes = parts[""].view(TORCH_DTYPES[self.dtype])
        scale = parts["_scale"].float().reshape(-1, 1).expand(codes.shape[0], 1)
        return widen(codes.shape[0], columns, lambda piece: from_float8(codes[piece]).mul_(scale[piece]))


class Mxfp8Codec(Codec):
    def marker(self, options: Options) -> dict[str, Any]:
        return {"format": "mxfp8"}

    def layout(self, rows: int, columns: int, options: Options) -> Layout:
        return {
            "": ("F8_E4M3", (rows, round_up(columns, 32))),
            "_scale": ("U8", _scale_shape(rows, columns, 32)),  # or F8_E8M0: the same bytes
        }

    def stored(self, rows: int, columns: int, options: Options) -> Shapes:
        return {"": (round_up(rows, 32), round_up(columns, 32)), "_scale": _scale_shape(rows, columns, 32)}

    def dequantize(self, parts: Parts, columns: int, options: Options) -> Tensor:
        codes = parts[""].view(torch.float8_e4m3fn)
        blocks = codes.shape[1] // 32
        exponents = _from_tiles(parts["_scale"].view(torch.uint8), codes.shape[0], blocks)
        scales = (exponents.int() << 23).view(torch.float32)  # the exponent 0 means 0, as in comfy-kitchen

        def unpack(piece: slice) -> Tensor:
            wide = from_float8(codes[piece]).view(-1, blocks, 32).mul_(scales[piece].unsqueeze(2))
            return wide.view(-1, blocks * 32)[:, :columns]

        return widen(codes.shape[0], columns, unpack)


class Nvfp4Codec(Codec):
    names: ClassVar[Mapping[str, str]] = {"": "weight", "_scale": "weight_scale", "_scale_2": "weight_scale_2"}

    def marker(self, options: Options) -> dict[str, Any]:
        return {"format": "nvfp4"}

    def layout(self, rows: int, columns: int, options: Options) -> Layout:
        return {
            "": ("U8", (rows, round_up(columns, 16) // 2)),
            "_scale": ("F8_E4M3", _scale_shape(rows, columns, 16)),
            "_scale_2": ("F32", ()),
        }

    def stored(self, rows: int, columns: int, options: Options) -> Shapes:
        padded = (round_up(rows, 16), round_up(columns, 16) // 2)
        return {"": padded, "_scale": _scale_shape(rows, columns, 16), "_scale_2": ()}

    def dequantize(self, parts: Parts, columns: int, options: Options) -> Tensor:
        packed = parts[""]
        blocks = packed.shape[1] // 8
        block_scales = _from_tiles(parts["_scale"].view(torch.uint8), packed.shape[0], blocks)
        scales = from_float8(block_scales.contiguous().view(torch.float8_e4m3fn)).mul_(parts["_scale_2"].reshape(()))
        values = torch.tensor(_E2M1 + tuple(-value for value in _E2M1), device=packed.device)

        def unpack(piece: slice) -> Tensor:
            wide = unpack_nibbles(packed[piece], values, high_first=True).view(-1, blocks, 16)
            return wide.mul_(scales[piece].unsqueeze(2)).view(-1, blocks * 16)[:, :columns]

        return widen(packed.shape[0], columns, unpack)


def _scale_shape(rows: int, columns: int, block: int) -> tuple[int, int]:
    return round_up(rows, TILE_ROWS), round_up(round_up(columns, block) // block, TILE_BLOCKS)


def _from_tiles(scales: Tensor, rows: int, blocks: int) -> Tensor:
    """Bytes as stored, whole tiles -> [rows, blocks]."""
    across = round_up(blocks, TILE_BLOCKS) // TILE_BLOCKS
    tiles = scales.reshape(-1, across, 32, 4, TILE_BLOCKS)  # tile row, tile column, r % 32, r // 32, block
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1, across * TILE_BLOCKS)[:rows, :blocks]


CODECS: dict[str, Codec] = {
    "fp8": Fp8Codec(),
    "fp8_e5m2": Fp8Codec("F8_E5M2"),
    "mxfp8": Mxfp8Codec(),
    "nvfp4": Nvfp4Codec(),
}


def codec(row: Format) -> Codec:
    return CODECS[row.name]
