"""Buffers that weights are read into, one large allocation each: freeing it returns every byte to the system.

Allocated tensor by tensor, blocks that came and went left holes in the C heap: 8 steps of the full model planned for
6 GB ended at 6.09 GB (2-core Zen 4, glibc), and at 5.83 GB since.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 64  # what torch itself gives a tensor


def aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


class Arena:
    """Hands out pieces one after another, and forgets them all at once."""

    def __init__(self, n_bytes: int) -> None:
        self._buffer, self._used = torch.empty(n_bytes, dtype=torch.uint8), 0

    def take(self, n_bytes: int) -> Tensor:
        """[n_bytes] uint8, valid until `clear`."""
        start, self._used = self._used, self._used + aligned(n_bytes)
        assert self._used <= len(self._buffer), "more was taken than was planned"
        return self._buffer[start : start + n_bytes]

    def clear(self) -> None:
        """The next piece is the first again."""
        self._used = 0
