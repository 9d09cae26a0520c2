"""An adapter, as asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike, fspath

from ..errors import UserError
from .limits import MAX_LORA_STRENGTH

_BLOCKS = re.compile(
    r"(?P<group>layers|noise_refiner|context_refiner|siglip_refiner)(?:\.(?P<first>\d+)(?:-(?P<last>\d+))?)?"
)


@dataclass(frozen=True)
class Lora:
    """An adapter by its path (a file, a PEFT folder, OWNER/NAME[/FILE] of the Hub), and how strong it is: 1 as it was
    trained, 0 not at all, negative turned round.

    blocks: "layers.3", "layers.0-9" or "noise_refiner" -> how many times as strong there; the last that names a block
    counts.
    """

    path: str
    strength: float = 1.0
    blocks: Mapping[str, float] | tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        path = fspath(self.path)
        if not path.strip():
            raise UserError("a LoRA without a path", expected="a file, a folder, or OWNER/NAME on the Hub")
        object.__setattr__(self, "path", path)
        object.__setattr__(self, "strength", _strength(self.strength, f"{path}: strength"))
        named = tuple((name, _strength(factor, f"{path}: {name}")) for name, factor in dict(self.blocks).items())
        object.__setattr__(self, "blocks", named)
        for name, _ in named:
            if not _BLOCKS.fullmatch(name):
                raise UserError(f"{path}: blocks", got=repr(name)[:60], expected="such as layers.0-9 or noise_refiner")

    @classmethod
    def of(cls, value: object) -> Lora:
        """What people write: "PATH" or "PATH:STRENGTH", where a drive's letter is no path, or an object of the fields
        above. Raises UserError."""
        if isinstance(value, Lora):
            return value
        if isinstance(value, str):
            path, number = path_and_number(value)
            return cls(path) if number is None else cls(path, number)
        if isinstance(value, PathLike):
            return cls(value)  # type: ignore[arg-type]
        if isinstance(value, Mapping) and "path" in value and set(value) <= {field.name for field in fields(cls)}:
            try:
                return cls(**value)
            except (TypeError, ValueError):
                pass  # a path that is no text, blocks that are no object
        expected = '"PATH", "PATH:0.8" or {"path": "PATH", "strength": 0.8}'
        raise UserError("loras", got=repr(value)[:60], expected=expected)

    @classmethod
    def several(cls, values: object) -> tuple[Lora, ...]:
        """One or many of these."""
        if not isinstance(values, list | tuple):
            values = [] if values is None else [values]
        return tuple(map(cls.of, values))

    def on(self, module: str) -> float:
        """How strong it is on a module of the transformer."""
        factors = [factor for name, factor in dict(self.blocks).items() if _names(name, module)]
        return self.strength * (factors or [1.0])[-1]

    def require_blocks(self, counts: Mapping[str, int]) -> None:
        """Raise UserError for one that the transformer does not have. counts: blocks of each group."""
        for name in dict(self.blocks):
            group, first, last = _range(name)
            if first is not None and last is not None and not first <= last < counts[group]:
                raise UserError(f"{self.path}: blocks", got=name, expected=f"blocks of {group}.0-{counts[group] - 1}")


def _range(name: str) -> tuple[str, int | None, int | None]:
    """The group, and which of its blocks, all of them if None."""
    found = _BLOCKS.fullmatch(name)
    assert found, "checked where it came in"
    if found["first"] is None:
        return found["group"], None, None
    return found["group"], int(found["first"]), int(found["last"] or found["first"])


def _names(name: str, module: str) -> bool:
    group, first, last = _range(name)
    own, _, inner = module.partition(".")
    number = inner.partition(".")[0]
    return own == group and (first is None or last is None or first <= int(number) <= last)


def path_and_number(text: str) -> tuple[str, float | None]:
    """PATH or PATH:NUMBER, where a drive's letter is no path."""
    path, _, number = text.rpartition(":")
    return (path, float(number)) if path and _is_number(number) else (text, None)


def number_of(value: object, where: str) -> float:
    """Raises UserError for what is none. where: for messages."""
    if isinstance(value, bool) or not _is_number(value):
        raise UserError(where, got=repr(value)[:40], expected="a number such as 0.8")
    return float(value)  # type: ignore[arg-type]


def _strength(value: object, where: str) -> float:
    number = number_of(value, where)
    if not abs(number) <= MAX_LORA_STRENGTH:
        raise UserError(where, got=number, expected=f"a number from -{MAX_LORA_STRENGTH} to {MAX_LORA_STRENGTH}")
    return number


def _is_number(value: object) -> bool:
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False
    return True
