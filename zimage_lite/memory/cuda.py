"""The link to an NVIDIA GPU: a copy stream beside the computing one, events between the two, and pinned memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_PAGE_BYTES = 4096


class CudaLink:
    """Copies run on a stream of their own. A moment is a CUDA event."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copying = torch.cuda.Stream(device)
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._pinned: list[Tensor] = []

    def copy(self, source: Tensor, into: Tensor, after: Sequence[torch.cuda.Event]) -> torch.cuda.Event:
        with torch.cuda.stream(self.copying):
            for moment in after:
                self.copying.wait_event(moment)
            into.copy_(source, non_blocking=True)
            done = torch.cuda.Event(blocking=True)  # who waits for it sleeps: CPU and GPU of a laptop share their power
            done.record(self.copying)
        self.copying.query()  # Windows collects what is submitted, and would start the copy late
        return done

    def mark(self) -> torch.cuda.Event:
        moment = torch.cuda.Event(blocking=True)
        moment.record(torch.cuda.current_stream(self.device))
        return moment

    def hold(self, moment: torch.cuda.Event) -> None:
        computing = torch.cuda.current_stream(self.device)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(computing)
        computing.wait_event(moment)
        after.record(computing)
        self._waits.append((before, after))

    def block(self, moment: torch.cuda.Event) -> None:
        moment.synchronize()

    def waited_seconds(self) -> float:
        torch.cuda.synchronize(self.device)
        return sum(before.elapsed_time(after) for before, after in self._waits) / 1000

    def pin(self, buffer: Tensor) -> bool:
        """Let the GPU read this memory while the CPU does something else. Not by torch's own pinned tensors: it rounds
        each up to a power of two. False if the system does not allow so much; then copies are slower, but right."""
        start = buffer.data_ptr() // _PAGE_BYTES * _PAGE_BYTES
        end = -(-(buffer.data_ptr() + buffer.nbytes) // _PAGE_BYTES) * _PAGE_BYTES
        status = torch.cuda.cudart().cudaHostRegister(start, end - start, 0)
        if int(status):
            return False
        self._pinned.append(buffer)
        return True

    def close(self) -> None:
        """When nothing is being copied any more."""
        self.copying.synchronize()
        for buffer in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr() // _PAGE_BYTES * _PAGE_BYTES)
        self._pinned.clear()
