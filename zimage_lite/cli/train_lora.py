"""zimage-lite train-lora FOLDER"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..checkpoint.model_card import DEMO
from ..config import DEVICES, OPTIMIZERS, RATES, TIMESTEPS, Lora, RuntimeOptions, TrainOptions
from ..errors import EXIT_INTERRUPTED
from ..units import ceiling, counted, format_gb
from . import leaving_at_once, print_json, say

if TYPE_CHECKING:
    from ..pipeline.drawing import Pipeline
    from ..train.session import Session

_DEFAULT = TrainOptions()
_PATH = click.Path(path_type=Path)


@click.command(name="train-lora")
@click.argument("folder", type=_PATH)
@click.option(
    "--model", default=DEMO, show_default=True, help="Model to teach: folder, all-in-one file, or Hub id OWNER/NAME."
)
@click.option("-o", "--output", "out", type=_PATH, default=Path("my.safetensors"), show_default=True, help="LoRA file.")
@click.option(
    "--trigger", default="", metavar="WORD", help="Comes in front of every caption that does not have it yet."
)
@click.option(
    "--preserve",
    multiple=True,
    metavar="WORD",
    help="What the trigger is a kind of, such as dog: it stays as it was. Once for each.",
)
@click.option(
    "--preserve-prompts",
    "preserve_file",
    type=_PATH,
    metavar="FILE.txt",
    help="Prompts, one a line, of what else stays as it was: as varied as what will be drawn with the LoRA.",
)
@click.option(
    "--preserve-weight",
    type=float,
    default=_DEFAULT.preserve_weight,
    show_default=True,
    help="How much what is to stay counts beside what is new.",
)
@click.option("--steps", type=int, default=_DEFAULT.steps, show_default=True, help="Of the optimizer.")
@click.option("--rank", type=int, default=_DEFAULT.rank, show_default=True, help="Its size: 4.4 MB for each.")
@click.option("--rate", type=float, default=_DEFAULT.rate, show_default=True, help="How far a step goes.")
@click.option(
    "--rate-schedule",
    type=click.Choice(RATES),
    default=_DEFAULT.rate_schedule,
    show_default=True,
    help="cosine falls to nothing at the last step, so that steps cannot be added later.",
)
@click.option("--batch", type=int, default=_DEFAULT.batch, show_default=True, help="Pictures a step.")
@click.option(
    "--resolution",
    type=int,
    help="Pictures are trained at about its square in pixels, in their own shape.  [default: 512, or the model's own]",
)
@click.option(
    "--timesteps",
    type=click.Choice(TIMESTEPS),
    default=_DEFAULT.timesteps,
    show_default=True,
    help="Which noise levels are learned: mostly middle ones, or all alike.",
)
@click.option("--shift", type=float, default=_DEFAULT.shift, show_default=True, help="Moves them towards noise.")
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), default=_DEFAULT.optimizer, show_default=True)
@click.option("--seed", type=int, default=_DEFAULT.seed, show_default=True)
@click.option(
    "--assistant",
    "assistants",
    multiple=True,
    metavar="PATH[:STRENGTH]",
    help="A LoRA that is there while training and not afterwards: for Turbo ostris/zimage_turbo_training_adapter.",
)
@click.option(
    "--sample", "prompts", multiple=True, metavar="PROMPT", help="Draw this on the way.  [default: the first caption]"
)
@click.option(
    "--every", type=int, default=250, show_default=True, help="Save, draw samples and write the page every N steps."
)
@click.option("--resume", is_flag=True, help="Go on where it was stopped or killed.")
@click.option("--overwrite", is_flag=True, help="Begin anew, replace the file; with --resume, go on and replace it.")
@click.option("--vram", metavar="SIZE", help="Ceiling for the GPU's memory, such as 8GB.  [default: what is free]")
@click.option("--ram", metavar="SIZE", help="Ceiling for the process's memory, such as 16GB.  [default: what is free]")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
def command(
    folder: Path, model: str, out: Path, trigger: str, preserve: tuple[str, ...], preserve_file: Path | None,
    resolution: int | None, assistants: tuple[str, ...], prompts: tuple[str, ...], every: int, resume: bool,
    overwrite: bool, vram: str | None, ram: str | None, device: str, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Teach the model what the pictures in FOLDER show, as a LoRA.

    Captions lie beside them, 1.txt beside 1.png, or in one JSON Lines file of {"file_name": ..., "caption": ...}.
    Ctrl-C saves; --resume goes on.
    """
    vram_bytes, ram_bytes = ceiling(vram), ceiling(ram)
    # Samples are drawn as it is trained, on unpacked weights: to re-encode them takes memory that training does not.
    runtime = RuntimeOptions(device, vram_bytes=vram_bytes, ram_bytes=ram_bytes, compute="16bit")
    given = TrainOptions(**options, resolution=resolution or _DEFAULT.resolution, trigger=trigger)

    with leaving_at_once():
        from ..api import open_named
        from ..pipeline.drawing import Pipeline
        from ..train.dataset import examples_in
        from ..train.prior import prompts_in
        from ..train.session import Goal, Session
    from .progress import phase_progress

    examples = examples_in(folder, trigger)
    pipeline = Pipeline(open_named(model, {}), runtime, tell=lambda line: say(f"note: {line}"))
    if resolution is None:
        given = replace(given, resolution=min(given.resolution, *pipeline.model.default_size))
    assistant = Lora.several(assistants)
    kept = prompts_in(preserve_file) if preserve_file else ()
    goal = Goal(out, examples, given, assistant, preserve, kept, prompts or (examples[0].caption,), every)
    session = Session(pipeline, goal, resume, overwrite)
    _introduce(pipeline, session)
    with phase_progress("denoise", "encode", "pictures", "train", "decode") as progress, stopping() as stop:
        finished = session.run(progress, stop)
    result = _measured(session, finished)
    say(_summary(result))
    if as_json:
        print_json(result)
    if not finished:
        say(f"stopped after step {session.done.step}, all of it is saved; go on with --resume")
        click.get_current_context().exit(EXIT_INTERRUPTED)


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Yields what says whether somebody wants it to stop: asked for once, it may end its step; the second time it is
    interrupted at once."""
    asked = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        if asked.is_set():
            signal.default_int_handler(number, frame)
        asked.set()
        say("stopping after this step; once more stops at once")

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, note)
    try:
        yield asked.is_set
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _introduce(pipeline: Pipeline, session: Session) -> None:
    """What will be done, and how much memory it takes."""
    goal, plan = session.goal, session.trainer.ways.plan
    if not pipeline.model.scheduler.undistilled and not goal.assistant:
        say(
            "note: of a distilled model, such as Turbo, long trainings without --assistant undo the distillation; "
            "Z-Image Base needs none"
        )
    stay = f"{len(plan.resident)} of {len(plan.homes)} blocks stay, the others pass through"
    gpu = f"{format_gb(plan.peak_vram_bytes)} of GPU memory, " if plan.device == "gpu" else ""
    say(
        f"{counted(len(goal.examples), 'picture')}, {goal.options.steps} steps; planned: {gpu}"
        f"{format_gb(plan.peak_ram_bytes)} of RAM; {'all blocks stay' if not plan.streamed else stay}"
    )


def _measured(session: Session, finished: bool) -> dict[str, Any]:
    work, done = session.trainer.work, session.done
    plan, measured = session.trainer.ways.plan, work.meter.phases.get("train", {})
    page = session.goal.folder / "index.html"
    return {
        "lora": str(session.goal.out) if finished else None,
        "steps": done.step,
        "loss": done.losses[-1] if done.losses else None,
        "page": str(page) if page.is_file() else None,  # before the first --every there is none
        "planned_vram_bytes": plan.peak_vram_bytes if plan.device == "gpu" else None,
        "planned_ram_bytes": plan.peak_ram_bytes,
        "plan": plan.facts(),
        "measured": measured,
    }


def _summary(result: dict[str, Any]) -> str:
    measured = result["measured"]
    peaks = [f"{format_gb(measured.get('peak_rss_bytes', 0))} of RAM"]
    if result["planned_vram_bytes"]:
        peaks.insert(0, f"{format_gb(measured.get('peak_reserved_bytes', 0))} of GPU memory")
    where = result["lora"] or result["page"]
    took = measured.get("seconds", 0)
    seconds = f"{took:.{int(took < 10)}f} s of training; memory: {', '.join(peaks)}"
    return f"{where}  ({seconds})" if where else seconds
