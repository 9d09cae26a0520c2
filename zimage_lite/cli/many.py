"""generate -o FOLDER, and --workers: maybe thousands of pictures, by several processes, and again after a stop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.output import clear_leftovers, require_absent
from ..config import GenerateOptions, RuntimeOptions
from ..errors import BudgetError, UserError
from ..pictures.difference import difference
from ..pictures.recipe import asked
from ..pictures.saving import KINDS, recipe_of, require_kind, save_file
from ..workers.lines import Drawer, Task, draw_all
from ..workers.orders import DrawError, Drawn, LostError, Order, Watch
from ..workers.places import Workers
from . import leaving_at_once, say
from .progress import picture_progress

DIGITS = 5  # whatever the number of lines, so that a file that grows keeps the names of what is drawn


def is_folder(out: Path) -> bool:
    """Whether -o means one: its name has no end, or it is there and has none of a picture."""
    return not out.suffix or (out.is_dir() and out.suffix.lower() not in KINDS)


def paths_in(folder: Path, count: int) -> list[Path]:
    """Of pictures by their lines; the folder is made, and cleared of what a killed run left. Raises UserError."""
    if folder == Path("-"):
        raise UserError("-o -: pictures do not go to stdout", fix="name a file or a folder")
    require_absent(folder, overwrite=True)
    if folder.exists() and not folder.is_dir():
        require_kind(folder)
    folder.mkdir(exist_ok=True)
    for leftover in list(folder.glob(".*.png.*.partial")):
        clear_leftovers(folder / f"{leftover.name[1:].split('.')[0]}.png")
    return [folder / f"{number:0{DIGITS}}.png" for number in range(1, count + 1)]


@dataclass(frozen=True)
class Many:
    """Pictures, and where they go."""

    model: str | None
    parts: dict[str, Path | None]
    requests: Sequence[GenerateOptions]
    paths: Sequence[Path]

    def missing(self, drawer: Drawer) -> list[int]:
        """drawer: says what is drawn now. Raises UserError where there is another picture than the one that is asked
        for, DrawError, LostError."""
        there = {number for number, path in enumerate(self.paths) if path.exists()}
        kinds = list(dict.fromkeys(_of_no_prompt(self.requests[number]) for number in sorted(there)))
        recipes = drawer.recipes(Order(self.model, kinds, self.parts), _Aloud()) if kinds else []
        wanted = dict(zip(kinds, recipes, strict=True))
        for number in sorted(there):
            request = self.requests[number]
            own = {name: value for name, value in asked(request).items() if value is not None}
            _require_same(self.paths[number], {**wanted[_of_no_prompt(request)], **own})
        return [number for number in range(len(self.paths)) if number not in there]

    def draw(self, drawers: Sequence[Drawer], numbers: Sequence[int]) -> None:
        """Those of these numbers. Raises UserError, DrawError, LostError."""
        with picture_progress(len(numbers)) as progress:

            def keep(number: int, drawn: Drawn) -> None:
                save_file(self.paths[number], drawn.file)
                progress()
                say(f"{self.paths[number]}  seed {self.requests[number].seed}")

            draw_all(drawers, numbers, Task(self._order, keep, _Aloud().note))

    def _order(self, numbers: Sequence[int]) -> Order:
        suffix = self.paths[0].suffix.lower()
        return Order(self.model, [self.requests[number] for number in numbers], self.parts, suffix)


class _Aloud(Watch):
    def note(self, line: str) -> None:
        say(f"note: {line}")


def _of_no_prompt(request: GenerateOptions) -> GenerateOptions:
    """The same for lines whose pictures differ by what they say themselves alone."""
    return replace(request, prompt="", negative="", seed=0)


def _require_same(path: Path, wanted: Mapping[str, Any]) -> None:
    if found := difference(recipe_of(path), wanted):
        name, got, expected = found
        fix = "name another folder with -o, or delete what shall be drawn anew"
        raise UserError(f"{path} was drawn otherwise", got=f"{name} {got!r:.60}", expected=f"{expected!r:.60}", fix=fix)


def draw_many(many: Many, workers: str | None, runtime: RuntimeOptions, again: bool) -> dict[str, Any]:
    """again: what is there is kept. -> what `--json` prints. Raises UserError."""
    with _drawers(Workers.of(workers) if workers else None, runtime) as drawers:
        try:
            numbers = many.missing(drawers[0]) if again else list(range(len(many.paths)))
            if kept := len(many.paths) - len(numbers):
                say(f"{kept} of {len(many.paths)} pictures are there already")
            if numbers:
                many.draw(drawers, numbers)
        except DrawError as error:
            raise _told(error) from None
        except LostError as error:
            raise UserError(str(error), fix="the same command draws what is missing") from None
    images, seeds = [str(path) for path in many.paths], [request.seed for request in many.requests]
    return {"images": images, "seeds": seeds, "drawn": len(numbers), "kept": kept}


@contextmanager
def _drawers(workers: Workers | None, runtime: RuntimeOptions) -> Iterator[Sequence[Drawer]]:
    if workers:
        from ..workers.cluster import hired

        with hired(workers, runtime) as found:
            yield found
    else:
        with leaving_at_once():
            from ..workers.drawer import Drawer as Own
        yield [Own(runtime)]


def _told(error: DrawError) -> Exception:
    """As it would be in one process."""
    if error.detail:
        return RuntimeError(f"a worker failed\n{error.detail}")
    return BudgetError(error.message) if error.code in ("too_large", "out_of_memory") else UserError(error.message)
