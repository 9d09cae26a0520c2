"""Loops compiled for this CPU: what is common to them. Importing numba takes half a second, so who needs it imports it
late."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Any:
    """Holds no lock, so that several threads can run it at once. The code is kept between runs where numba finds a
    folder to write to. No fastmath: that would allow sums in another order, and fused multiply-adds."""
    try:  # error_model: what divides by zero goes on, so the loop vectorises
        return numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache is writable
        return numba.njit(nogil=True, error_model="numpy")(function)
