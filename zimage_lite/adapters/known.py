"""Adapters that change how many steps a model wants, told by their files' names, with what their authors ask for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from ..config import GenerateOptions, Lora


@dataclass(frozen=True)
class Known:
    """steps: as many; None where the model's own hold. guided: whether guidance is wanted; None where it is left alone.
    strengths: from, to."""

    pattern: str
    steps: int | None
    guided: bool | None
    strengths: tuple[float, float]

    def wants(self) -> str:
        low, high = self.strengths
        said = [f"--steps {self.steps}"] if self.steps else []
        said += {None: [], True: ["guidance"], False: ["--guidance 0"]}[self.guided]
        return ", ".join([*said, f"strength {low:g}" if low == high else f"strength {low:g} to {high:g}"])


KNOWN = (
    Known(r"fun-lora-distill-4-?steps", 4, False, (1.0, 1.0)),  # alibaba-pai, for Base
    Known(r"fun-lora-distill-8-?steps", 8, False, (0.7, 0.8)),
    Known(r"turbo-?distillpatch", 8, False, (1.0, 1.0)),  # DiffSynth-Studio: repairs Turbo beside a LoRA that blurs it
    Known(r"turbo-?training-?adapter", 30, True, (1.0, 1.0)),  # ostris: undoes the distillation
)


def unlike(lora: Lora, request: GenerateOptions) -> str | None:
    """What a known adapter wants otherwise than it is asked for; None if it is unknown, or all is well. request:
    complete."""
    file = PurePosixPath(lora.path.replace("\\", "/"))
    name = re.sub(r"[ _]", "-", file.stem.lower())
    known = next((known for known in KNOWN if re.search(known.pattern, name)), None)
    if known is None or lora.strength <= 0:  # a negative one takes something back
        return None
    low, high = known.strengths
    fits = (
        known.steps in (None, request.step_count)
        and known.guided in (None, bool(request.guidance))
        and low <= lora.strength <= high
    )
    if fits:
        return None
    got = f"--steps {request.step_count}, --guidance {request.guidance or 0:g}, strength {lora.strength:g}"
    return f"{file.name} is made for {known.wants()}; got {got}"
