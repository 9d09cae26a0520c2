"""Weights of other integer formats, as rotated int8, so that 8-bit units multiply them.

On a CPU they become int8 while they are read, once for all steps where a block stays: re-encoding takes 2.3 ns of a
thread for each weight (a Zen 3) beside what unpacking takes anyway, at 256x256 more than the products of a step.

On a GPU a block stays packed where it is; before it computes, its weights are expanded into one scratch buffer, which
the next block takes over. That costs one pass over the weights, on an RTX 3060 Laptop about 1 ms for int4 and 2 ms for
K-quants of a full-size block's 38 (predictions), while more of the packed blocks stay, and copies are shorter.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from zimage_kernels import Int8Rows, requantize, unpacks

from ..checkpoint.stored import StoredTensor, aligned
from ..model.linear import Linear, Stream
from ..plan.footprint import REENCODED_AT_ONCE, is_rotated, reencoded_bytes
from ..quant.formats import FORMATS
from ..quant.int8 import rotation_group
from ..quant.tensor import QTensor, rows_columns

# One weight after another: each takes all threads, and memory as planned. Readers wait for each other here.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class ReencodedTensor:
    """A stored weight that is int8 wherever it is read to. See `StoredTensor`."""

    stored: StoredTensor

    @property
    def packed_bytes(self) -> int:
        return reencoded_bytes(self.stored.format, self.stored.rows, self.stored.columns)

    def packed_in(self, buffer: Tensor) -> QTensor:
        group = _group(self.stored)
        rows = _rows_in(buffer, self.stored.shape)
        return QTensor(FORMATS["int8"], self.stored.shape, _parts(rows), {"group": group})

    def read_to(self, buffer: Tensor) -> None:
        """buffer: [packed_bytes] uint8 on the CPU."""
        stored, out = self.stored, _rows_in(buffer, self.stored.shape)
        step = stored.piece_rows(REENCODED_AT_ONCE)
        for start in range(0, stored.rows, step):
            rows = slice(start, min(start + step, stored.rows))
            piece = stored.read(rows.start, rows.stop)
            with _ONE_AT_A_TIME:
                _by_codecs(piece, Int8Rows(out.codes[rows], out.scale[rows]), _group(stored))

    def forget(self) -> None:
        self.stored.forget()


def when_read(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor | ReencodedTensor]:
    """Those that kernels could re-encode; the others as they are. So files compute alike everywhere."""
    return {own: ReencodedTensor(t) if _is_reencoded(_empty(t)) else t for own, t in tensors.items()}


def _empty(tensor: StoredTensor) -> QTensor:
    """Without bytes."""
    return tensor.packed_in(torch.empty(tensor.packed_bytes, dtype=torch.uint8, device="meta"))


class Scratch:
    """Room for the largest of these blocks on a GPU: name -> its tensors by their names in it."""

    def __init__(self, blocks: Mapping[str, Mapping[str, StoredTensor | QTensor]], device: torch.device) -> None:
        sizes = (
            sum(reencoded_bytes(t.format, *rows_columns(t.shape)) for t in tensors.values())
            for tensors in blocks.values()
        )
        self.buffer = torch.empty(max(sizes, default=0), dtype=torch.uint8, device=device)

    def through(self, stream: Stream) -> Stream:
        """The same stream, in which each block computes with int8 weights."""

        def blocks(wanted: Iterable[nn.Module]) -> Iterator[nn.Module]:
            for block in stream(wanted):
                with self._reencoded(block):
                    yield block

        return blocks

    @contextmanager
    def _reencoded(self, block: nn.Module) -> Iterator[None]:
        used, packed = 0, dict[Linear, tuple[QTensor, QTensor]]()
        try:
            for owner in block.modules():
                if isinstance(owner, Linear) and owner.packed is not None and _is_reencoded(owner.packed):
                    n_bytes = reencoded_bytes(owner.packed.format, *owner.packed.shape)
                    int8 = reencoded(owner.packed, self.buffer[used : used + n_bytes])
                    packed[owner], used = (owner.packed, int8), used + n_bytes
                    owner.packed = int8
            yield
        finally:
            for owner, (weight, int8) in packed.items():
                if owner.packed is int8:  # else it was released, perhaps long before an abandoned pass gets here
                    owner.packed = weight

    def end(self) -> None:
        """Let go of the buffer, so that its memory is free even while somebody still has a stream."""
        self.buffer = self.buffer[:0].clone()


def reencoded(weight: QTensor, place: Tensor) -> QTensor:
    """As int8, by the kernel, in place: [reencoded_bytes] uint8."""
    out, group = _rows_in(place, weight.shape), _group(weight)
    requantize(weight.format.name, weight.parts, weight.options, out, group, weight.first_row)
    return QTensor(FORMATS["int8"], weight.shape, _parts(out), {"group": group})


def _is_reencoded(weight: QTensor) -> bool:
    rows, columns = rows_columns(weight.shape)
    return rows > 1 and unpacks(weight.format.name, weight.parts, weight.options, columns)


def _group(weight: StoredTensor | QTensor) -> int:
    """Columns that are rotated together."""
    if is_rotated(weight.format):
        return int(weight.options["group"])
    return rotation_group(rows_columns(weight.shape)[1])


def _rows_in(place: Tensor, shape: tuple[int, ...]) -> Int8Rows:
    """place: [reencoded_bytes] uint8 -> codes [rows, columns], scale [rows]."""
    rows, columns = rows_columns(shape)
    codes = place[: rows * columns].view(torch.int8).view(rows, columns)
    return Int8Rows(codes, place[aligned(rows * columns) :][: 4 * rows].view(torch.float32))


def _parts(rows: Int8Rows) -> dict[str, Tensor]:
    return {"": rows.codes, "_scale": rows.scale.view(-1, 1)}


def _by_codecs(weight: QTensor, out: Int8Rows, group: int) -> None:
    """What `requantize` does, without a kernel. Formats that stand for rotated integers give them as they are."""
    first, columns = 0, weight.shape[1]
    as_it_is = getattr(weight.format.codec, "rotated_int8", None)
    for piece in weight.pieces():
        rows = slice(first, first + piece.shape[0])
        if as_it_is:
            codes, scale = as_it_is(piece.parts, columns, piece.options)
        else:
            codes, scale = FORMATS["int8"].codec.quantize(piece.dequantize(), {"group": group}).values()
        out.codes[rows], out.scale[rows] = codes, scale.view(-1)
        first = rows.stop
