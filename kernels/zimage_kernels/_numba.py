"""Loops compiled for this CPU: what is common to them. Importing numba takes half a second, so who needs it imports it
late."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import torch


def compiled(function: Callable[..., Any]) -> Any:
    """Holds no lock, so that several threads can run it at once. The code is kept between runs where numba finds a
    folder to write to. No fastmath: that would allow sums in another order, and fused multiply-adds."""
    try:  # error_model: what divides by zero goes on, so the loop vectorises
        return numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache is writable
        return numba.njit(nogil=True, error_model="numpy")(function)


def in_threads(run: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> None:
    """run(*task) for each, on as many threads as torch takes, of which this one is one."""
    todo = deque(tasks)

    def work() -> None:
        while True:
            try:
                task = todo.popleft()
            except IndexError:
                return
            run(*task)

    others = min(torch.get_num_threads(), len(todo)) - 1
    with ThreadPoolExecutor(max(others, 1)) as threads:
        running = [threads.submit(work) for _ in range(others)]
        work()
        for thread in running:
            thread.result()
