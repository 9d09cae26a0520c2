"""generate -o FOLDER, and --workers: maybe thousands of pictures, by several processes, and again after a stop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.output import clear_leftovers, require_absent
from ..config import GenerateOptions, RuntimeOptions
from ..errors import BudgetError, UserError
from ..pictures.recipe import asked
from ..pictures.saving import KINDS, recipe_of, save_file
from ..workers.lines import Drawer, Task, draw_all
from ..workers.orders import DrawError, Drawn, LostError, Order
from ..workers.places import Workers
from . import leaving_at_once, say
from .progress import picture_progress

DIGITS = 5  # whatever the number of lines, so that a file that grows keeps the names of what is drawn


def is_folder(out: Path) -> bool:
    """Whether -o means one: its name has no end, or it is there and has none of a picture."""
    return not out.suffix or (out.is_dir() and out.suffix.lower() not in KINDS)


def paths_in(folder: Path, count: int) -> list[Path]:
    """Of pictures by their lines; the folder is made, and cleared of what a killed run left. Raises UserError."""
    require_absent(folder, overwrite=True)
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

    def missing(self) -> list[int]:
        """Raises UserError where there is another picture than the one that is asked for."""
        return [number for number, path in enumerate(self.paths) if not self._is_there(path, self.requests[number])]

    def draw(self, workers: Workers | None, runtime: RuntimeOptions, numbers: Sequence[int]) -> None:
        """Those of these numbers. Raises UserError."""
        with _drawers(workers, runtime) as drawers, picture_progress(len(numbers)) as progress:

            def keep(number: int, drawn: Drawn) -> None:
                save_file(self.paths[number], drawn.file)
                progress()
                say(f"{self.paths[number]}  seed {self.requests[number].seed}")

            try:
                draw_all(drawers, numbers, Task(self._order, keep, lambda line: say(f"note: {line}")))
            except DrawError as error:
                raise _told(error) from None
            except LostError as error:
                raise UserError(str(error), fix="the same command draws what is missing") from None

    def _order(self, numbers: Sequence[int]) -> Order:
        suffix = self.paths[0].suffix.lower()
        return Order(self.model, [self.requests[number] for number in numbers], self.parts, suffix)

    def _is_there(self, path: Path, request: GenerateOptions) -> bool:
        if not path.exists():
            return False
        said, wanted = recipe_of(path), asked(request)
        other = [name for name, value in wanted.items() if value is not None and said.get(name) != value]
        if other:
            got = f"{other[0]} {said.get(other[0])!r:.60}"
            fix = "name another folder with -o, or delete what shall be drawn anew"
            raise UserError(f"{path} was drawn otherwise", got=got, expected=f"{wanted[other[0]]!r:.60}", fix=fix)
        return True


def draw_many(many: Many, workers: str | None, runtime: RuntimeOptions, again: bool) -> dict[str, Any]:
    """again: what is there is kept. -> what `--json` prints. Raises UserError."""
    where = Workers.of(workers) if workers else None
    numbers = many.missing() if again else list(range(len(many.paths)))
    if kept := len(many.paths) - len(numbers):
        say(f"{kept} of {len(many.paths)} pictures are there already")
    if numbers:
        many.draw(where, runtime, numbers)
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
