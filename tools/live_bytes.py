"""Counts the bytes of all tensors that are alive, on any device: what an allocator would hold, without its rounding.

On the meta device too, where a computation of any size costs neither memory nor time. For tests and benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`with LiveBytes() as live: ...`. peak_bytes: the most that tensors made in the block held at once, by operation:
    what an operation takes and gives back inside itself is not seen. device: which tensors to count; all by default."""

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.device = device
        self.peak_bytes = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {
            tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and self.device in (None, tensor.device):
                storage = tensor.untyped_storage()
                if storage._cdata not in given:  # else a view of what was there, perhaps before the block
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(n_bytes for _, n_bytes in self._alive.values()))
        return out


class NoLaunch:
    """In the place of a Triton kernel, where its tensors are on the meta device."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: None
