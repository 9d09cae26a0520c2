"""The link to an NVIDIA GPU: a copy stream beside the computing one, events between the two, and pinned memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..units import round_up

PAGE_BYTES = 4096
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every CUDA context of the process


def numbered(device: torch.device) -> torch.device:
    """The same with its number, without which some of torch.cuda's functions raise ValueError."""
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


class CudaLink:
    """Copies run on a stream of their own. A moment is a CUDA event.

    Make it when all places on the device are there: they come from the computing stream's allocator, so whatever was
    asked of that stream until now may still be using their memory. Close it before they are given back.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = numbered(device)  # threads begin with device 0 as their current one, whatever this one has chosen
        self.copying = torch.cuda.Stream(self.device)
        self.copying.wait_stream(torch.cuda.current_stream(self.device))
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._pinned: list[int] = []  # where they begin

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

    def pause(self) -> torch.cuda.Event:
        moment = torch.cuda.Event(enable_timing=True)
        moment.record(torch.cuda.current_stream(self.device))
        return moment

    def hold(self, moment: torch.cuda.Event, paused: torch.cuda.Event) -> None:
        computing = torch.cuda.current_stream(self.device)
        computing.wait_event(moment)
        self._waits.append((paused, self.pause()))

    def block(self, moment: torch.cuda.Event) -> None:
        moment.synchronize()

    def waited_seconds(self) -> float:
        torch.cuda.synchronize(self.device)
        return sum(before.elapsed_time(after) for before, after in self._waits) / 1000

    def pin(self, buffer: Tensor) -> bool:
        """Let the GPU read this memory while the CPU does something else. Not by torch's own pinned tensors: it rounds
        each up to a power of two. False if the system does not allow so much; then copies are slower, but right.

        No copy may come from a buffer while it is being pinned. A refusal is remembered as CUDA's last error by the
        calling thread, where torch would take it for that of the next kernel: call it in a thread that has no others.
        """
        start = buffer.data_ptr() // PAGE_BYTES * PAGE_BYTES
        end = round_up(buffer.data_ptr() + buffer.nbytes, PAGE_BYTES)
        with torch.cuda.device(self.device):
            status = torch.cuda.cudart().cudaHostRegister(start, end - start, _PORTABLE)
        if int(status):
            return False
        self._pinned.append(start)
        return True

    def close(self) -> None:
        """When nothing is being copied any more."""
        try:
            self.copying.synchronize()
        finally:
            while self._pinned:
                torch.cuda.cudart().cudaHostUnregister(self._pinned.pop())
