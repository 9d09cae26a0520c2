"""What a failed or interrupted call leaves behind, and how it goes at once.

A traceback holds the frames that it passed, and with them tensors, generators that wait at a yield, and context
managers that an interrupt met between opening and entering. As long as someone keeps it, an interactive session the
last one, a reader's future its own, memory stays taken, threads stay alive, and what closes later would take weights
out of the next call's hands.
"""

from __future__ import annotations

from collections.abc import Callable
from traceback import clear_frames
from types import TracebackType

import torch

from ..errors import UserError

# The CPU allocator's on Linux and on Windows, that of CUDA's own calls and of Triton, and cuBLAS's.
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class Clearing:
    """As a context manager: whatever is raised in it, GeneratorExit too, leaves nothing open. release: what an
    interrupted closing may not have reached; called last.

    Our own faults keep the lines of their traceback, though not the frames' contents.
    """

    def __init__(self, release: Callable[[], None]) -> None:
        self.release = release

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: TracebackType | None) -> None:
        if error is None:
            return
        clear_frames(error.__traceback__)
        self.release()
        if isinstance(error, KeyboardInterrupt | UserError):
            raise error.with_traceback(None)  # a frame that is cleared still holds what its function closed over


def forget(error: BaseException) -> None:
    """Let go of what its frames hold."""
    clear_frames(error.__traceback__)
    error.__traceback__ = None


def is_out_of_memory(error: Exception) -> bool:
    """Of whatever memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
