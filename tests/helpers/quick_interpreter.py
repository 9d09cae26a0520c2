"""Triton's interpreter, without what it repeats.

It swaps the language's functions for its own when a kernel is launched, and again for every function that the kernel
calls, 138,000 times for one picture: half of its time. Here they are swapped once in a launch, for the kernel and for
the language's own functions in Triton.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from triton.language import core
from triton.runtime import interpreter


def install() -> None:
    patch, launched = getattr(interpreter, "_patch_lang", None), []
    if patch is None:  # a version that does it otherwise
        return

    def patch_once(kernel: Any) -> Any:
        if launched:
            return SimpleNamespace(restore=lambda: None)
        launched.extend([patch(kernel), patch(_calls_the_core)])

        def restore() -> None:
            while launched:
                launched.pop().restore()

        return SimpleNamespace(restore=restore)

    interpreter._patch_lang = patch_once


def _calls_the_core() -> Any:
    """A function in whose module the interpreter finds `core`."""
    return core
