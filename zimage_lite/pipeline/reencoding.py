"""Weights of other integer formats, as rotated int8, for as long as their block computes.

A block stays packed where it is; before it computes, its weights are expanded into one scratch buffer, which the next
block takes over. That costs one pass over the weights, on an RTX 3060 Laptop about 1 ms for int4 and 2 ms for
K-quants of a full-size block's 38 (predictions), and lets files of every integer format run on 8-bit matrix units. On a
CPU without such units it costs more than it saves at 256x256, 2.3 ns of a thread for each weight (a Zen 3) beside what
unpacking takes anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from zimage_kernels import Backend, Int8Rows, requantize, unpacks, use_triton

from ..checkpoint.stored import StoredTensor, aligned
from ..model.linear import Linear, Stream
from ..plan.footprint import is_reencoded, reencoded_bytes
from ..quant.formats import FORMATS
from ..quant.int8 import rotation_group
from ..quant.tensor import QTensor, rows_columns


class Scratch:
    """Room for the largest of these blocks: name -> its tensors by their names in it. backend: that re-encodes."""

    def __init__(
        self,
        blocks: Mapping[str, Mapping[str, StoredTensor | QTensor]],
        device: torch.device,
        backend: Backend = "triton",
    ) -> None:
        self.backend: Backend = backend
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
                if isinstance(owner, Linear) and owner.packed is not None and is_reencoded(owner.packed.format):
                    n_bytes = reencoded_bytes(owner.packed.format, *owner.packed.shape)
                    int8 = reencoded(owner.packed, self.buffer[used : used + n_bytes], self.backend)
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


def reencoded(weight: QTensor, place: Tensor, backend: Backend = "triton") -> QTensor:
    """As int8, in place: [reencoded_bytes] uint8. A weight that the kernel cannot unpack is returned as it is, whatever
    the backend: files compute alike everywhere."""
    rows, columns = weight.shape
    if not unpacks(weight.format.name, weight.parts, weight.options, columns):
        return weight
    group = weight.options["group"] if weight.format.family == "comfy_int" else rotation_group(columns)
    codes = place[: rows * columns].view(torch.int8).view(rows, columns)
    scale = place[aligned(rows * columns) :][: 4 * rows].view(torch.float32)
    if use_triton(backend, place.device):
        requantize(weight.format.name, weight.parts, weight.options, Int8Rows(codes, scale), group, weight.first_row)
    else:
        _by_codecs(weight, Int8Rows(codes, scale), group)
    parts = {"": codes, "_scale": scale.view(rows, 1)}
    return replace(weight, format=FORMATS["int8"], parts=parts, options={"group": group}, first_row=0)


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
