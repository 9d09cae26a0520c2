"""What the codecs of other programs' formats share: rows in pieces, nibbles, thresholds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from .formats import Parts

# 4 MB of float32: a dozen element-wise passes stay in the cache, and temporaries stay small.
PIECE_WEIGHTS = 2**20
WITHOUT_FLOAT8 = ("mps",)


def row_pieces(rows: int, columns: int, weights: int = PIECE_WEIGHTS) -> Iterator[slice]:
    step = max(weights // max(columns, 1), 1)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def by_pieces(rows: int, columns: int, work: Callable[[slice], Parts], weights: int = PIECE_WEIGHTS) -> Parts:
    """What `work` makes of all rows, about so many weights at a time. Its parts have a row for each row."""
    out: Parts = {}
    for piece in row_pieces(rows, columns, weights):
        parts = work(piece)
        if piece.stop - piece.start == rows:
            return parts
        for suffix, part in parts.items():
            if suffix not in out:
                out[suffix] = part.new_empty((rows, *part.shape[1:]))
            out[suffix][piece] = part
    return out


def widen(rows: int, columns: int, work: Callable[[slice], Tensor]) -> Tensor:
    """The same for a `work` that unpacks rows: [rows, columns] float32."""
    return by_pieces(rows, columns, lambda piece: {"": work(piece)})[""]


def largest(x: Tensor) -> Tensor:
    """max|x| of a whole tensor, without another tensor of its size."""
    return torch.stack([x[piece].abs().amax() for piece in row_pieces(x.shape[0], x.shape[1])]).amax()


def from_float8(codes: Tensor) -> Tensor:
    """8-bit floats -> float32. torch has none on Apple's GPUs (its issue 148420): there each byte is looked up."""
    if codes.device.type not in WITHOUT_FLOAT8 or codes.itemsize > 1 or not codes.is_floating_point():
        return codes.float()
    values = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float().to(codes.device)
    return values.index_select(0, codes.view(torch.uint8).flatten().int()).view(codes.shape)


def pack_nibbles(codes: Tensor, *, high_first: bool) -> Tensor:
    """[rows, 2n] uint8 below 16 -> [rows, n]."""
    even, odd = codes[:, 0::2], codes[:, 1::2]
    return (even << 4) | odd if high_first else even | (odd << 4)


def unpack_nibbles(packed: Tensor, values: Tensor, *, high_first: bool) -> Tensor:
    """[rows, n] bytes -> [rows, 2n] float32: values[nibble]. values: [16] float32.

    Both nibbles of a byte are looked up at once, as one complex number: four times as fast as one after the other.
    """
    byte = torch.arange(256, device=values.device)
    low, high = values[byte & 15], values[byte >> 4]
    pairs = torch.complex(high, low) if high_first else torch.complex(low, high)
    index = packed.contiguous().view(torch.uint8).flatten().int()
    return torch.view_as_real(pairs.index_select(0, index)).view(packed.shape[0], -1)


def count_below(x: Tensor, thresholds: Iterable[Tensor]) -> Tensor:
    """How many of the thresholds lie below each x, as uint8: the code of the nearest level, if they lie midway.

    15 comparisons are three times as fast as torch.bucketize: 150 against 54 million a second on one Zen core.
    """
    count = torch.zeros_like(x, dtype=torch.uint8)
    for threshold in thresholds:
        count.add_((x > threshold).view(torch.uint8))
    return count
