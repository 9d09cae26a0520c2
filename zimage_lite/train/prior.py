"""Prior preservation: what the model draws of the like, before it learns, is learned in turn with what is new, so that
it stays as it was (Ruiz et al., DreamBooth, 2023)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from ..checkpoint.output import replacing
from ..config import GenerateOptions
from ..errors import UserError
from ..pictures.recipe import recipe
from ..pictures.saving import save
from ..pipeline.drawing import Pipeline
from ..pipeline.workspace import Progress
from .dataset import Example

LEAST = 48  # pictures, however few there are of what is new
_LIST = "captions.jsonl"


def prior_examples(examples: Sequence[Example], trigger: str, words: Sequence[str], folder: Path) -> list[Example]:
    """What `draw` will put there: the captions of what is new in turn, each with a word in the trigger's place. Raises
    UserError."""
    if not words:
        return []
    if not trigger:
        raise UserError("--preserve puts its word in the place of the trigger", fix="name the --trigger, too")
    captions, found = [example.caption for example in examples], list[Example]()
    for number in range(max(len(examples), LEAST)):
        word, caption = words[number % len(words)], captions[number % len(captions)]
        told = word.join(re.split(re.escape(trigger), caption, flags=re.IGNORECASE))
        found.append(Example(folder / f"{number:04}.png", told))
    return found


def draw(pipeline: Pipeline, wanted: Sequence[Example], resolution: int, seed: int, progress: Progress) -> None:
    """Those that are not there yet, with the captions that they were drawn for."""
    if not wanted:
        return
    folder = wanted[0].path.parent
    folder.mkdir(parents=True, exist_ok=True)
    missing = [(number, one) for number, one in enumerate(wanted) if not one.path.exists()]
    requests = [
        pipeline.complete(GenerateOptions(one.caption, resolution, resolution, seed=seed + number))
        for number, one in missing
    ]
    for index, pixels in pipeline.images(requests, progress):
        save(missing[index][1].path, pixels, recipe(requests[index], pipeline.model, (resolution, resolution)))
    lines = [json.dumps({"file_name": one.path.name, "caption": one.caption}) for one in wanted]
    with replacing(folder / _LIST) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
