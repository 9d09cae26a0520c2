"""A ControlNet, as asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike, fspath

from ..errors import UserError
from .lora import number_of, path_and_number

MAX_SCALE = 10


@dataclass(frozen=True)
class ControlUse:
    """A ControlNet by its file, its folder, OWNER/NAME[/FILE] of the Hub, "demo" or "synthetic:VERSION/FORMAT", and the
    scale of its hints; None: what its authors draw with."""

    path: str
    scale: float | None = None

    def __post_init__(self) -> None:
        path = fspath(self.path)
        if not path.strip():
            raise UserError("a ControlNet without a path", expected="a file or a folder")
        object.__setattr__(self, "path", path)
        if self.scale is None:
            return
        scale = number_of(self.scale, f"{path}: scale")
        if not 0 <= scale <= MAX_SCALE:
            raise UserError(f"{path}: scale", got=scale, expected=f"a number from 0 to {MAX_SCALE}, such as 0.8")
        object.__setattr__(self, "scale", scale)

    @classmethod
    def of(cls, value: object) -> ControlUse:
        """What people write: "FILE" or "FILE:SCALE", or an object of the fields above. Raises UserError."""
        if isinstance(value, ControlUse):
            return value
        if isinstance(value, str):
            return cls(*path_and_number(value))
        if isinstance(value, PathLike):
            return cls(value)  # type: ignore[arg-type]
        if isinstance(value, Mapping) and isinstance(value.get("path"), str) and set(value) <= {"path", "scale"}:
            return cls(**value)
        raise UserError(
            "controls", got=repr(value)[:60], expected='"FILE", "FILE:0.8" or {"path": "FILE", "scale": 0.8}'
        )

    @classmethod
    def several(cls, values: object) -> tuple[ControlUse, ...]:
        """One or many of these."""
        if not isinstance(values, list | tuple):
            values = [] if values is None else [values]
        return tuple(map(cls.of, values))
