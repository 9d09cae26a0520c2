"""What is to stay as it was: pictures that the model draws before it learns. In training it sees them between the new
ones, noisy as those, and is held to what it answers without the LoRA: so where it answers alike there is no gradient,
and few steps of a distilled model stay enough (as in Learning without Forgetting, Li and Hoiem, 2016; trainers have it
as differential output preservation). Flow matching on such pictures would teach what plain training teaches.
"""

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
from ..plan.training import preserved_pictures
from .dataset import Example, text_of

_LIST = "captions.jsonl"


def prior_examples(
    examples: Sequence[Example], trigger: str, words: Sequence[str], prompts: Sequence[str], folder: Path
) -> list[Example]:
    """What `draw` will put there: the captions of what is new in turn, each with one of the words in the trigger's
    place, and the prompts. Raises UserError."""
    if words and not trigger:
        raise UserError("--preserve puts its word in the place of the trigger", fix="name the --trigger, too")
    if same := [word for word in words if word.lower() == trigger.lower()]:
        raise UserError("--preserve", got=same[0], expected="another word than the trigger: what it is a kind of")
    captions = [example.caption for example in examples]
    told = [
        words[number % len(words)].join(re.split(re.escape(trigger), captions[number % len(captions)], flags=re.I))
        for number in range(preserved_pictures(len(examples), words, ()))
    ]
    return [Example(folder / f"{number:04}.png", caption) for number, caption in enumerate([*told, *prompts])]


def prompts_in(file: Path) -> tuple[str, ...]:
    """One a line. Raises UserError."""
    found = tuple(line.strip() for line in text_of(file).splitlines() if line.strip())
    if not found:
        raise UserError(f"{file}: no prompts in it", expected="one on each line")
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
