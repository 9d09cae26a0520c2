"""Quantizers that numba compiles, imported where they are used: it takes half a second."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from zimage_kernels import loops_obstacle

from ..errors import UserError


def loops(name: str) -> ModuleType:
    """`kquants_cpu` or `rows_cpu`. Raises UserError where numba compiles nothing: in Python they take hours."""
    if obstacle := loops_obstacle():
        fix = "install numba again" if "import" in obstacle else "unset it"
        raise UserError("quantizing takes loops that numba compiles", got=obstacle, fix=fix)
    return import_module(f".{name}", __package__)
