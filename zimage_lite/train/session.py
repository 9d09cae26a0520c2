"""A training from a folder of pictures to a file: what is written on the way, and how it is taken up again.

Beside NAME.safetensors, in NAME.training/: state.safetensors (all it takes to go on), step-000250.safetensors (the LoRA
as it was, the last few), step-000250-0.png (what it drew) and index.html (how it goes). Each appears whole.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.output import clear_leftovers, discarded, replacing, require_absent
from ..config import GenerateOptions, Lora, TrainOptions
from ..errors import UserError
from ..pictures.saving import save
from ..pipeline.drawing import Pipeline
from ..pipeline.workspace import Progress
from ..plan.training import STEPS_AT_ONCE
from . import prior
from .dataset import Example, fingerprint
from .lora_file import save_lora
from .progress_page import progress_page
from .state import Done, load_state, save_state
from .trainer import Trainer

KEPT = 4  # LoRAs of earlier steps


@dataclass(frozen=True)
class Goal:
    """out: the file; examples: what is new; preserve, preserve_prompts: words and prompts for what is to stay as it
    was, see prior.py; prompts: what is drawn on the way, and every so many steps."""

    out: Path
    examples: Sequence[Example]
    options: TrainOptions
    assistant: tuple[Lora, ...] = ()
    preserve: tuple[str, ...] = ()
    preserve_prompts: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    every: int = 250

    @property
    def folder(self) -> Path:
        return self.out.with_name(f"{self.out.stem}.training")

    @property
    def state(self) -> Path:
        return self.folder / "state.safetensors"


class Session:
    """Everything that can be refused is refused where it is made: what is there already, and what does not fit. Raises
    UserError, BudgetError."""

    def __init__(self, pipeline: Pipeline, goal: Goal, resume: bool = False, overwrite: bool = False) -> None:
        self.pipeline, self.goal, self.resume = pipeline, goal, resume
        _require(goal, resume, overwrite)
        options, folder = goal.options, goal.folder / "preserved"
        self.preserved = prior.prior_examples(
            goal.examples, options.trigger, goal.preserve, goal.preserve_prompts, folder
        )
        self.trainer = Trainer(
            pipeline, [*goal.examples, *self.preserved], options, goal.assistant, len(self.preserved)
        )
        self.requests = [
            pipeline.complete(GenerateOptions(prompt, options.resolution, options.resolution, seed=options.seed))
            for prompt in goal.prompts
        ]
        pipeline.require_fit(self.requests)  # second, for it takes less: so one refusal names what will do
        self.done = Done(self._settings())

    def run(self, progress: Progress, stop: Callable[[], bool] = lambda: False) -> bool:
        """stop: asked after each step; then the state is saved. Returns whether all steps are done and the file is
        there."""
        goal, trainer = self.goal, self.trainer
        goal.folder.mkdir(exist_ok=True)
        _clear_leftovers(goal)
        if not self.resume:
            _clear(goal.folder)
        prior.draw(self.pipeline, self.preserved, goal.options.resolution, goal.options.seed, progress)
        trainer.prepare(progress)
        self._begin()
        while self.done.step < goal.options.steps:
            with closing(trainer.steps(self.done.step, self._next())) as steps:
                stopped = self._follow(steps, progress, stop)
            if stopped or self.done.step % goal.every == 0 or self.done.step == goal.options.steps:
                save_state(goal.state, self.done, trainer.lora, trainer.optimizer)
            if stopped and self.done.step < goal.options.steps:
                return False
            if self.done.step % goal.every == 0 or self.done.step == goal.options.steps:
                self._show()
        self._save(goal.out)
        return True

    def _begin(self) -> None:
        self.trainer.begin()
        if self.resume and self.goal.state.exists():
            self.done = load_state(self.goal.state, self.done.settings, self.trainer.lora, self.trainer.optimizer)

    def _follow(self, steps: Iterator[float], progress: Progress, stop: Callable[[], bool]) -> bool:
        """Until the steps end, or it is to stop."""
        for loss in steps:
            self.done.losses.append(loss)
            progress("train", self.done.step, self.goal.options.steps)
            if stop():
                return True
        return False

    def _next(self) -> int:
        """Where the next stretch of steps ends."""
        at = self.done.step
        ends = [(at // length + 1) * length for length in (self.goal.every, STEPS_AT_ONCE)]
        return min(*ends, self.goal.options.steps)

    def _save(self, path: Path) -> None:
        save_lora(path, self.trainer.lora, self.goal.options, self.done.step, len(self.goal.examples))

    def _show(self) -> None:
        """A line, the LoRA as it is, what it draws, and the page. While it draws, the training lies on the disk:
        drawing has all the memory."""
        goal, trainer, lately = self.goal, self.trainer, self.done.losses[-self.goal.every :]
        self.pipeline.tell(f"step {self.done.step}: loss {sum(lately) / len(lately):.4f}")
        lora = goal.folder / f"step-{self.done.step:06}.safetensors"
        self._save(lora)
        for old in sorted(goal.folder.glob("step-??????.safetensors"))[:-KEPT]:
            discarded(old)  # unless a program tries it, which on Windows keeps it until the next time
        if self.requests:
            trainer.put_away()
            self._draw(lora)
            trainer.begin()
            load_state(goal.state, self.done.settings, trainer.lora, trainer.optimizer)
        page = progress_page(goal.out.name, self.done.losses, self._facts(), goal.folder, goal.prompts)
        with replacing(goal.folder / "index.html") as partial:
            partial.write_text(page, encoding="utf-8")

    def _draw(self, lora: Path) -> None:
        requests = [replace(request, loras=(Lora(str(lora)),)) for request in self.requests]
        for index, pixels in self.pipeline.images(requests):
            file = self.goal.folder / f"{lora.stem}-{index}.png"
            save(file, pixels, self.pipeline.recipe(requests[index], pixels))

    def _settings(self) -> Mapping[str, Any]:
        """What a training that is taken up must find again: all that its numbers depend on."""
        goal, transformer = self.goal, self.pipeline.model.transformer
        options = asdict(goal.options)
        if goal.options.rate_schedule == "constant":
            del options["steps"]  # there may be more of them
        return {
            **options,
            "pictures": fingerprint(goal.examples),
            "model": f"{self.pipeline.model.name}, {transformer.main_format}, {transformer.nbytes} bytes",
            "dtype": self.trainer.hardware.dtype_name,
            "assistant": [f"{Path(lora.path).name}:{lora.strength:g}" for lora in goal.assistant],
            "preserve": list(goal.preserve),
            "preserve_prompts": f"{len(goal.preserve_prompts)}, {zlib.crc32(repr(goal.preserve_prompts).encode()):08x}",
        }

    def _facts(self) -> dict[str, str]:
        options = self.goal.options
        return {
            "model": str(self.done.settings["model"]),
            "pictures": str(len(self.goal.examples)),
            "steps": f"{self.done.step} of {options.steps}",
            "rank": str(options.rank),
            "rate": f"{options.rate:g}",
            "pictures a step": str(options.batch),
            "resolution": str(options.resolution),
            "trigger": options.trigger or "none",
        }


def _clear(folder: Path) -> None:
    """What another training of that name wrote there, and nothing else."""
    for pattern in ("state.safetensors", "step-*.safetensors", "step-*.png", "preserved/????.png"):
        for file in folder.glob(pattern):
            file.unlink()


def _clear_leftovers(goal: Goal) -> None:
    """What a training that was killed had not finished writing."""
    partial = goal.folder.rglob(".*.partial")
    for path in {goal.out, *(file.with_name(file.name[1:].rsplit(".", 2)[0]) for file in partial)}:
        clear_leftovers(path)


def _require(goal: Goal, resume: bool, overwrite: bool) -> None:
    """Raise UserError for what is in the way."""
    if goal.out.suffix != ".safetensors":
        raise UserError("-o", got=str(goal.out), expected="a name that ends in .safetensors")
    if goal.every < 1:
        raise UserError("--every", got=goal.every, expected="at least 1")
    if resume and goal.out.exists() and not overwrite:
        raise UserError(
            f"{goal.out} is there, so that training has ended", fix="for more --steps, go on with --resume --overwrite"
        )
    require_absent(goal.out, overwrite)
    if resume and not goal.state.exists():
        raise UserError(f"--resume: no {goal.state}", fix="begin without it")
    if goal.state.exists() and not (resume or overwrite):
        raise UserError(f"{goal.folder} holds a training", fix="go on with --resume, or begin anew with --overwrite")
