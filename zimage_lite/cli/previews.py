"""--preview: after each step, what the picture will be like, in a file or in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.output import is_held, replacing
from ..errors import UserError
from . import say

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..pipeline.denoise import Step
    from ..pipeline.drawing import Pipeline

TERMINAL = "terminal"


@contextmanager
def previewing(where: str | None, taef1: Path | None, pipeline: Pipeline) -> Iterator[Callable[[Step], None] | None]:
    """Yields what is to be called after each step; None if nobody looks. where: a .png, or "terminal"."""
    if where is None:
        if taef1 is not None:
            raise UserError("--preview-decoder without a preview", fix="say where to show it with --preview")
        yield None
        return
    from PIL import Image

    from ..pipeline.previews import previewer

    show, preview = _shower(where), previewer(pipeline.model, taef1)
    yield lambda step: show(Image.fromarray(preview(step.x0).numpy()))


def _shower(where: str) -> Callable[[Image], None]:
    if where == TERMINAL:
        from .terminal_picture import terminal

        screen = terminal()
        if screen is None:
            say("note: this terminal cannot show pictures, so there is no preview: name a file with --preview FILE.png")
            return lambda picture: None
        return screen.show
    path = Path(where)
    if path.suffix.lower() != ".png":
        raise UserError("--preview", got=where, expected="a name that ends in .png, or terminal")

    held = False

    def save(picture: Image) -> None:
        nonlocal held
        if held:
            return
        try:
            with replacing(path, "--preview") as partial:
                picture.save(partial, format="PNG")
        except UserError as error:
            if not (held := path.exists() and is_held(error.__cause__)):
                raise
            say(f"note: no more previews: {error}")  # on Windows, where a viewer may have it open

    return save
