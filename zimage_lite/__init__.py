"""zimage-lite: Z-Image-Turbo inside the memory you name. Importing this loads no torch; the names below do, when used.

from zimage_lite import GenerateOptions, load, quantize
quantize("Z-Image-Turbo", "out", to="q8_0")
pipeline = load("out", ram="8GB")
image = pipeline.generate([GenerateOptions("a red circle")])[0]
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .config import ControlUse, GenerateOptions, Lora, RuntimeOptions
from .errors import BudgetError, UserError

if TYPE_CHECKING:
    from .api import load, quantize
    from .pipeline.drawing import Pipeline

try:
    __version__ = version("zimage-lite")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0"

__all__ = [
    "BudgetError", "ControlUse", "GenerateOptions", "Lora", "Pipeline", "RuntimeOptions", "UserError", "load",
    "quantize",
]  # fmt: skip

_LAZY = {"load": "api", "quantize": "api", "Pipeline": "pipeline.drawing"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
