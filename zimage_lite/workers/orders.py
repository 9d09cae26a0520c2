"""What goes to a worker and what comes back, as plain data that may travel to another process. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config import GenerateOptions
from ..errors import BudgetError, UserError
from ..pictures.recipe import sources_told

_CARRIED = ("image", "mask", "control_image", "references")  # small enough; latents have to lie where the worker is


@dataclass(frozen=True)
class Order:
    """model, parts: as `open_named` takes them; suffix: of the files that are wanted, as in `saving.KINDS`; told: of
    each request, what its picture says of the files that it is made from, where that is not what the worker sees."""

    model: str | None
    requests: Sequence[GenerateOptions]
    parts: Mapping[str, Path | None] = field(default_factory=dict)
    suffix: str = ".png"
    told: Sequence[Mapping[str, Any]] = ()

    @property
    def weights(self) -> tuple[Any, ...]:
        """What tells its model from others."""
        return self.model, *sorted((name, path) for name, path in self.parts.items() if path)

    def carried(self) -> Order:
        """For another process, maybe on another machine: with the pictures themselves, each once. Raises UserError."""
        known: dict[str, bytes] = {}
        requests = [_with_pictures(request, known) for request in self.requests]
        return replace(self, requests=requests, told=self.told or [sources_told(one) for one in self.requests])


def _with_pictures(request: GenerateOptions, known: dict[str, bytes]) -> GenerateOptions:
    given = {name: getattr(request, name) for name in _CARRIED}
    return replace(request, **{name: _carried(value, known) for name, value in given.items() if value is not None})


def _carried(value: Any, known: dict[str, bytes]) -> Any:
    """A file's bytes; what names no file, such as the mask `none`, as it is."""
    if isinstance(value, tuple | list):
        return tuple(_carried(one, known) for one in value)
    if not isinstance(value, str | Path) or not Path(value).is_file():
        return value
    try:
        return known.setdefault(str(value), known.get(str(value)) or Path(value).read_bytes())
    except OSError as error:
        raise UserError(f"{value}: cannot be read ({error.strerror})") from error


@dataclass(frozen=True)
class Drawn:
    """A picture: its place among the order's requests, its file with the recipe inside, and its size."""

    place: int
    file: bytes
    width: int
    height: int


class Watch:
    """How whoever gave an order hears of it, and is asked. This one hears nothing and wants all of it."""

    cancelled = False  # nobody wants it any more
    watched = False  # somebody looks at previews

    def progress(self, phase: str, done: int, total: int) -> None:
        """Of the phase."""

    def memory(self, facts: Mapping[str, Any]) -> None:
        """As `memory_facts` has them."""

    def preview(self, jpeg: bytes) -> None:
        """What the picture will be like; only while it is watched."""

    def note(self, line: str) -> None:
        """For people."""


class CancelledError(Exception):
    """The order was cancelled: raised in the middle of a run, which gives all memory back."""


class LostError(Exception):
    """The worker is gone, with what it had not handed over."""


class DrawError(Exception):
    """It could not be drawn; the worker goes on. code: "invalid_request", "too_large" (it does not fit the memory),
    "out_of_memory" or "internal", whose traceback is in detail."""

    def __init__(self, code: str, message: str, detail: str = "") -> None:
        super().__init__(code, message, detail)
        self.code, self.message, self.detail = code, message, detail

    @classmethod
    def of(cls, error: UserError) -> DrawError:
        return cls("too_large" if isinstance(error, BudgetError) else "invalid_request", str(error))
