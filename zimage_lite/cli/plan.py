"""zimage-lite plan"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..config import DEFAULT_SIZE, SAMPLERS, GenerateOptions, Lora, SchedulerConfig, TrainOptions
from ..errors import UserError
from ..units import ceiling, format_gb, parse_bytes
from . import print_json, say, table_printer
from .drawing_options import control_options, picture_options, reference_options

if TYPE_CHECKING:
    from ..memory.gpus import Gpu
    from ..memory.machine import Machine
    from ..memory.plan import Budgets, Plan
    from ..plan.model_sizes import Model

_RAM = "16GB"
_HOMES = {"device": "stay", "pinned": "in pinned RAM", "pageable": "in pageable RAM", "file": "from the file each time"}


@dataclass(frozen=True)
class _Prediction:
    """The plans for the highest power limit, and how long the phases take at the lowest."""

    model: str
    gpu: Gpu
    budgets: Budgets
    size: tuple[int, int]
    steps: int
    count: int
    plans: Sequence[Plan]
    slow_plans: Sequence[Plan]
    controls: Sequence[str] = ()  # names

    @property
    def denoise(self) -> tuple[Plan, Plan]:
        """At both limits; of several, the last, which is the largest."""
        pairs = list(zip(self.plans, self.slow_plans, strict=True))
        return [pair for pair in pairs if pair[0].phase == "denoise"][-1]

    def of_controls(self) -> list[dict[str, Any]]:
        """Of each ControlNet its blocks, by where they wait, their bytes, and what they compute in a step in which it
        is asked, at both limits."""
        from ..model.controlnet import CONTROLS

        fast, found = self.denoise[0], []
        for i, name in enumerate(self.controls):
            own = {block: home for block, home in fast.homes.items() if block.startswith(f"{CONTROLS}.{i}.")}
            n_bytes = sum(fast.sizes[block] for block in own)
            times = [sum(p.compute_ms for p in plan.passages if p.name in own) for plan in self.denoise]
            found.append({"name": name, "blocks": _counts(own.values()), "bytes": n_bytes, "compute_ms": times})
        return found


def _counts(homes: Iterable[str]) -> dict[str, int]:
    there = list(homes)
    return {home: there.count(home) for home in _HOMES if home in there}


def _where(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {_HOMES[home]}" for home, count in counts.items())


@click.command(name="plan")
@click.option(
    "--model", help="Plan for this model folder, file, Hub id, or synthetic:FORMAT.  [default: Z-Image-Turbo's shapes]"
)
@click.option("--format", "format_name", metavar="FORMAT", help="Format of those shapes.  [default: int8]")
@click.option("--gpu", "gpu_name", metavar="NAME", help='Such as "RTX 3060 Laptop".  [default: the one that is here]')
@click.option("--vram", metavar="SIZE", help="Ceiling for the GPU's memory, such as 6GB.  [default: what is free]")
@click.option(
    "--ram",
    metavar="SIZE",
    help=f"Ceiling for the process's memory.  [default: what is free here; {_RAM} beside another GPU]",
)
@click.option("--width", type=int, help="Pixels, a multiple of 16.  [default: 1024, or the picture's]")
@click.option("--height", type=int, help="Pixels, a multiple of 16.  [default: 1024, or the picture's]")
@click.option("--steps", type=int, help="Denoising steps.  [default: the model's; Turbo 8, Base 30]")
@click.option("--count", type=int, default=1, show_default=True, help="Images of this size.")
@click.option("--lora", "loras", multiple=True, metavar="PATH", help="A LoRA beside the weights. Once for each.")
@click.option("--sampler", type=click.Choice(SAMPLERS), default="euler", show_default=True)
@picture_options
@reference_options
@control_options
@click.option("--train", is_flag=True, help="What train-lora would take, at --width as its resolution.")
@click.option("--rank", type=int, help="Of the LoRA, with --train.  [default: 16]")
@click.option("--batch", type=int, help="Pictures a step, with --train.  [default: 1]")
@click.option("--preserve", multiple=True, metavar="WORD", help="With --train: a word that stays as it was.")
@click.option(
    "--preserve-prompts",
    "preserve_file",
    type=click.Path(path_type=Path),
    metavar="FILE.txt",
    help="With --train: prompts, one a line, of what else stays as it was.",
)
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.svg", help="Draw one step as a picture.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
def command(
    model: str | None, format_name: str | None, gpu_name: str | None, vram: str | None, ram: str | None, count: int,
    loras: tuple[str, ...], train: bool, rank: int | None, batch: int | None, preserve: tuple[str, ...],
    preserve_file: Path | None, plot: Path | None, as_json: bool, **image: Any,
) -> None:  # fmt: skip
    """Predict where the weights would live, the memory peaks, the time, and what bounds it, for any GPU.

    Runs nothing: the answer comes from the sizes of the weights and a table of GPUs.
    """
    if model and format_name:
        raise UserError("--format is for the shapes of Z-Image-Turbo", fix="leave it out, a --model has its own")
    if plot and plot.suffix.lower() != ".svg":
        raise UserError("--plot", got=str(plot), expected="a name that ends in .svg")
    if count < 1:
        raise UserError("--count", got=count, expected="at least 1")
    limits = ceiling(vram), ceiling(ram)
    sizes, schedule = _sizes(model, format_name or "int8", sees=bool(image["references"]))
    if train:
        asked = {"resolution": image["width"], "rank": rank, "batch": batch}
        _train(sizes, gpu_name, limits, asked, preserve, preserve_file, as_json)
        return
    if rank or batch or preserve or preserve_file:
        raise UserError("--rank, --batch, --preserve and --preserve-prompts are of a training", fix="add --train")
    if image["controls"] and not image["control_image"]:
        image["control_image"] = _any_picture()
    wanted = GenerateOptions(loras=Lora.several(loras), **image)
    prediction = _predict(sizes, gpu_name, limits, schedule.completed(wanted, (DEFAULT_SIZE, DEFAULT_SIZE)), count)
    _describe(prediction, table_printer(as_json))
    if plot:
        from ..checkpoint.output import replacing
        from ..plan.timeline import as_svg

        size = "{}x{}".format(*prediction.size)
        title = f"Prediction: one step, {prediction.model} at {size} on {prediction.gpu.name}"
        with replacing(plot) as partial:
            partial.write_text(as_svg(prediction.denoise[0], title), encoding="utf-8")
        say(f"{plot}  one step")
    if as_json:
        print_json(_as_json(prediction))


def _train(
    sizes: Model,
    gpu_name: str | None,
    limits: tuple[int | None, int | None],
    asked: dict[str, Any],
    preserve: tuple[str, ...],
    preserve_file: Path | None,
    as_json: bool,
) -> None:
    from ..train.prior import prompts_in
    from .plan_training import predict_training

    sizes.require_trainable()
    prompts = prompts_in(preserve_file) if preserve_file else ()
    options = TrainOptions(**{name: value for name, value in asked.items() if value is not None})
    gpu, machines = _machines(gpu_name, *limits)
    found = predict_training(sizes, gpu.name, machines, limits, options, (preserve, prompts), table_printer(as_json))
    if as_json:
        print_json(found)


def _any_picture() -> Any:
    """What a ControlNet follows is as large as the image, whatever it is."""
    import numpy as np

    return np.zeros((1, 1, 3), np.uint8)


def _sizes(model: str | None, format_name: str, sees: bool) -> tuple[Model, SchedulerConfig]:
    """sees: references are named, so that the shapes are Omni's."""
    from ..plan.model_sizes import model_of, true_model

    if model is None:
        return true_model(format_name, sees), SchedulerConfig()
    from ..api import open_named

    files = open_named(model, {})
    if sees:
        from ..pipeline.references import require_seeing

        require_seeing(files, [GenerateOptions(references="a picture")])
    return model_of(files), files.scheduler


def _predict(
    model: Model, gpu_name: str | None, limits: tuple[int | None, int | None], wanted: GenerateOptions, count: int
) -> _Prediction:
    from ..adapters.library import AdapterLibrary
    from ..memory.planner import budgets_in_force, plan_phases
    from ..pipeline.controls import ControlLibrary
    from ..pipeline.grouping import grouped
    from ..pipeline.tasks import tasks_of
    from ..pipeline.words import prompts
    from ..plan.job import LONG_PROMPT_TOKENS
    from ..plan.prediction import phases

    def tell(line: str) -> None:
        say(f"note: {line}")

    gpu, machines = _machines(gpu_name, *limits)
    library = AdapterLibrary(model.transformer_config, tell)
    controls, default = ControlLibrary(model.transformer_config, tell), (DEFAULT_SIZE, DEFAULT_SIZE)
    tasks = tasks_of([wanted] * count, model.transformer_config.in_channels, default, controls.of)
    adapters = {wanted.loras: library.of(wanted.loras)}
    tokens = dict.fromkeys(prompts(wanted), LONG_PROMPT_TOKENS)
    first, *others = (phases(model, group.job, machines[0]) for group in grouped(tasks, tokens, adapters))
    todo = first + [ways for some in others for ways in some if ways[0].name != "encode"]
    budgets = budgets_in_force(machines[0], *limits)
    fast, slow = (plan_phases(todo, one, budgets) for one in machines)
    names = [net.name for net in tasks[-1].controls.nets]
    return _Prediction(model.name, gpu, budgets, tasks[-1].size, tasks[-1].steps, count, fast, slow, names)


def _machines(name: str | None, vram: int | None, ram: int | None) -> tuple[Gpu, list[Machine]]:
    """At the highest and at the lowest power limit: with the GPU named, else the one that is here with what is free,
    else the slowest with so much memory."""
    from ..memory.gpus import find_gpu, gpu_with
    from ..memory.machine import at_both_limits, processor

    here = None if name else _here()
    if here is not None:
        gpu, there = here
        return gpu, [replace(there, gpu=processor(gpu, high_power)) for high_power in (True, False)]
    if name is None and vram is None:
        raise UserError("this machine has no NVIDIA GPU that torch sees", fix='name one: --gpu "RTX 3060 Laptop"')
    gpu = find_gpu(name) if name else gpu_with(vram or 0)
    ram = parse_bytes(_RAM) if ram is None else ram
    machines = at_both_limits(gpu, ram, None if name else vram)
    if sys.platform == "win32":
        machines = [replace(one, pinned_limit_bytes=ram // 2) for one in machines]
    return gpu, machines


def _here() -> tuple[Gpu, Machine] | None:
    """The GPU of this machine, and what is free, as `generate` sees them."""
    import torch

    from ..memory.hardware import gpu_here, machine_here, probe

    if not torch.cuda.is_available():
        return None
    hardware = probe("cuda")
    return gpu_here(hardware.device), machine_here(hardware)


def _describe(prediction: _Prediction, show: Callable[[str], None]) -> None:
    from ..plan.timeline import as_text

    gpu, budgets = prediction.gpu, prediction.budgets
    width, height = prediction.size
    images = f"{prediction.count} images of {width}x{height}" if prediction.count > 1 else f"{width}x{height}"
    show(f"A prediction, nothing was run: {prediction.model}, {images}, {prediction.steps} steps, {gpu.name}")
    watts = f"{gpu.watts[0]}-{gpu.watts[1]} W" if gpu.watts[0] < gpu.watts[1] else f"{gpu.watts[1]} W"
    show(
        f"at {watts}, copies at {gpu.link_gbps:g} GB/s (PCIe {gpu.pcie}); within {_gib(budgets.vram_bytes)} of GPU "
        f"memory and {format_gb(budgets.ram_bytes)} of RAM"
    )
    show(f"{'phase':<9}{'on':<5}{'time':>16}{'GPU memory':>13}{'RAM':>10}  {'bound by':<10}how")
    for fast, slow in zip(prediction.plans, prediction.slow_plans, strict=True):
        ram = format_gb(fast.peak_ram_bytes)
        time = _seconds(fast.total_ms, slow.total_ms)
        facts = f"{fast.phase:<9}{fast.device:<5}{time:>16}{_gib(fast.peak_vram_bytes):>13}{ram:>10}  {fast.bound_by}"
        show(f"{facts:<65}{_how(fast)}".rstrip())
    total = [sum(plan.total_ms for plan in plans) for plans in (prediction.plans, prediction.slow_plans)]
    show(f"{'together':<14}{_seconds(*total):>16}")
    fast, slow = prediction.denoise
    slots = f"; {fast.slots} slots of {format_gb(fast.slot_bytes)}" if fast.slots else ""
    show(f"denoise: {len(fast.homes)} blocks: {_where(_counts(fast.homes.values()))}{slots}")
    asked = f", asked in {sum(not names for names in fast.idle)} of {fast.passes} passes" if fast.idle else ""
    for net in prediction.of_controls():
        blocks, (quick, slower) = net["blocks"], net["compute_ms"]
        count = f"{sum(blocks.values())} of these blocks, {format_gb(net['bytes'])}: {_where(blocks)}"
        show(f"{net['name']}: {count}; computing them takes {quick:.0f}-{slower:.0f} ms of a step{asked}")
    show("beside them: " + ", ".join(f"{name} {format_gb(n_bytes)}" for name, n_bytes in fast.fixed.items()))
    which, most = ("a step on average", "at most ") if fast.idle else ("a step", "")
    show(
        f"{which}: {fast.pass_ms:.0f}-{slow.pass_ms:.0f} ms, {most}{format_gb(fast.link_bytes)} over the link, "
        f"{format_gb(fast.disk_bytes)} from the disk; the first takes {fast.startup_ms / 1000:.1f} s longer, to load"
    )
    for line in as_text(fast):
        show(line)
    show("(one step; digits: the slot of a block that passes through, #: blocks that stay, .: waiting)")


def _how(plan: Plan) -> str:
    """What of a phase's ways is not the plain one: batches, bands."""
    if plan.phase == "denoise":
        return f"{plan.way} images at once" if plan.way > 1 else ""
    return str(plan.way) if plan.way else ""


def _as_json(prediction: _Prediction) -> dict[str, Any]:
    phases = []
    for fast, slow in zip(prediction.plans, prediction.slow_plans, strict=True):
        times = {name: [getattr(fast, name), getattr(slow, name)] for name in ("pass_ms", "startup_ms", "total_ms")}
        phases.append({"phase": fast.phase, **fast.facts(), "homes": fast.homes, **times})
    return {
        "prediction": True,
        "model": prediction.model,
        "gpu": prediction.gpu.name,
        "watts": prediction.gpu.watts,
        "size": prediction.size,
        "steps": prediction.steps,
        "count": prediction.count,
        "vram_bytes": prediction.budgets.vram_bytes,
        "ram_bytes": prediction.budgets.ram_bytes,
        "phases": phases,
        "controls": prediction.of_controls(),
    }


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"


def _seconds(fast_ms: float, slow_ms: float) -> str:
    """From the highest to the lowest power limit."""
    fast, slow = f"{fast_ms / 1000:.1f}", f"{slow_ms / 1000:.1f}"
    return f"{fast} s" if fast == slow else f"{fast}-{slow} s"
