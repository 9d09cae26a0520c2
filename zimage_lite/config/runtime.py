"""Where and how to run."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError
from .limits import BACKENDS, COMPUTES, DEVICES, DTYPES


@dataclass(frozen=True)
class RuntimeOptions:
    """Where and how to run. `None` budgets mean: what is free now."""

    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"
    vram_bytes: int | None = None
    ram_bytes: int | None = None
    cache: bool = True  # keep prompt embeddings on the disk
    compute: str = "auto"

    def __post_init__(self) -> None:
        choices = {"device": DEVICES, "dtype": DTYPES, "backend": BACKENDS, "compute": COMPUTES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"--{name}", got=repr(getattr(self, name)), expected=f"one of {', '.join(known)}")
