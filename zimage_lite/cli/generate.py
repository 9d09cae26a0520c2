"""zimage-lite generate PROMPT..."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..checkpoint.architecture import other_encoder
from ..checkpoint.detect import COMPONENTS, said_of_unused
from ..checkpoint.model_card import DEMO
from ..checkpoint.output import require_absent
from ..config import BACKENDS, COMPUTES, DEVICES, DTYPES, PREVIEW_BYTES, GenerateOptions, RuntimeOptions
from ..errors import UserError
from ..memory.meter import peak_rss_bytes
from ..pictures.saving import require_kind, save
from ..units import ceiling, format_gb, parse_bytes
from . import leaving_at_once, print_json, say
from .drawing_options import control_options, picture_options, reference_options, sampling_options, watching_options
from .like import Liked, liked
from .many import Many, draw_many, is_folder, paths_in
from .previews import previewing
from .requests import Seed, requests_of, require_apart

if TYPE_CHECKING:
    from torch import Tensor

    from ..pipeline.drawing import Pipeline

_IMAGE = GenerateOptions()
_PATH = click.Path(path_type=Path)


@click.command(name="generate")
@click.argument("prompts", nargs=-1, metavar="PROMPT...")
@click.option(
    "--prompts",
    "prompt_file",
    type=_PATH,
    metavar="FILE.jsonl",
    help="One JSON object a line: prompt, and whatever of the other options is its own, by their names: seed, width, "
    "steps, cfg, loras, image, mask, sampler, ...",
)
@click.option(
    "--model",
    help="Model folder, all-in-one file, Hub id OWNER/NAME, or synthetic:FORMAT, random weights of the true size made "
    "in memory.  [default: demo, built in]",
)
@click.option(
    "-o",
    "--output",
    "out",
    type=_PATH,
    default=Path("image.png"),
    show_default=True,
    help="PNG, JPEG or WebP file, by its end; several images count up from it. A folder gets 00001.png and so on, of "
    "which only those are drawn that are not there.",
)
@click.option(
    "--workers",
    metavar="WHERE",
    help="Draw by several processes: a number, gpus (one on each GPU of this machine), or ray://HOST[:PORT][/NUMBER] "
    "(one on each GPU of a Ray cluster). Needs the extra ray. --vram and --ram hold for each.",
)
@click.option(
    "--like",
    type=_PATH,
    metavar="PICTURE",
    help="Draw with the settings that this picture carries, but for those that are named beside it; also of one by "
    "A1111 or whatever writes its texts.",
)
@click.option("--width", type=int, help="Pixels, a multiple of 16.  [default: the model's; Turbo 1024]")
@click.option("--height", type=int, help="Pixels, a multiple of 16.  [default: the model's; Turbo 1024]")
@click.option("--steps", type=int, help="Denoising steps.  [default: the model's; Turbo 8, Base 30]")
@click.option(
    "--seed",
    type=Seed(),
    default=str(_IMAGE.seed),
    show_default=True,
    help="Seed of the first image; the next ones count up. random (or -1) draws one.",
)
@click.option("--count", type=int, default=1, show_default=True, help="Images per prompt.")
@click.option(
    "--guidance",
    type=float,
    help="Guidance as diffusers counts it; 0 is off.  [default: the model's; Turbo 0, Base 4]",
)
@click.option("--cfg", type=float, help="The same as ComfyUI counts it: 1 is off, and 5 is --guidance 4.")
@click.option("--negative", metavar="TEXT", default="", help="What to steer away from, with --guidance.")
@click.option("--shift", type=float, help="Shift of the noise schedule.  [default: the model's; Turbo 3]")
@sampling_options
@picture_options
@reference_options
@control_options
@watching_options
@click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="PATH[:STRENGTH]",
    help="LoRA, LoHa, LoKr, DoRA or OFT: a file, a PEFT folder, or OWNER/NAME[/FILE] on the Hub, of any trainer. Once "
    "for each; strengths may be negative.  [default strength: 1]",
)
@click.option(
    "--lora-dir",
    type=_PATH,
    metavar="FOLDER",
    help="Where <lora:NAME:STRENGTH> in prompts is looked up. Without it, that is text.",
)
@click.option("--vram", metavar="SIZE", help="Ceiling for the GPU's memory, such as 6GB.  [default: what is free]")
@click.option("--ram", metavar="SIZE", help="Ceiling for the process's memory, such as 8GB.  [default: what is free]")
@click.option("--transformer", type=_PATH, metavar="FILE", help="Use this transformer.")
@click.option("--text-encoder", type=_PATH, metavar="FILE", help="Use this text encoder.")
@click.option("--vae", type=_PATH, metavar="FILE", help="Use this VAE.")
@click.option("--siglip", type=_PATH, metavar="FILE", help="Use this SigLIP2 vision tower, for --reference.")
@click.option("--tokenizer", type=_PATH, metavar="PATH", help="Use this tokenizer.json, or the one in this folder.")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    show_default=True,
    help="What to compute in; fp32 on the CPU.",
)
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="auto",
    show_default=True,
    help="What the transformer computes with. triton, our kernels, needs CUDA and compute capability 7.5 or newer; on "
    "7.5 itself torch multiplies and attends between them. auto takes it where it can run, plain torch elsewhere.",
)
@click.option(
    "--compute",
    type=click.Choice(COMPUTES),
    default="auto",
    show_default=True,
    help="int8 multiplies the transformer's int8 weights in 8 bits, and all other integer formats, re-encoded; 16bit "
    "unpacks weights to --dtype. auto is int8 with triton; on a CPU for int8 weights if that is faster than float32, "
    "for others where the CPU has units for it (VNNI).",
)
@click.option(
    "--no-cache",
    is_flag=True,
    help="Neither keep the prompts' embeddings on the disk nor use kept ones. (ZIMAGE_LITE_CACHE=off does the same, "
    "and =FOLDER names another place.)",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
def command(
    prompts: tuple[str, ...], prompt_file: Path | None, model: str | None, out: Path, count: int,
    vram: str | None, ram: str | None, device: str, dtype: str, backend: str, compute: str, no_cache: bool,
    as_json: bool, like: Path | None, lora_dir: Path | None, transformer: Path | None, text_encoder: Path | None,
    vae: Path | None, siglip: Path | None, tokenizer: Path | None, preview: str | None, preview_decoder: Path | None,
    save_latents: bool, workers: str | None, **image: Any,
) -> None:  # fmt: skip
    """Draw images from prompts, and over pictures.

    Give one or several PROMPTs, or a file of them; they share one loaded model.
    """
    parts = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae, "siglip": siglip}
    parts |= {"tokenizer": tokenizer}
    model = _model(model, parts)
    example = liked(like, image, _given(image), lora_dir) if like else Liked()
    if not prompts and not prompt_file:
        prompts = example.prompts
    requests = requests_of(prompts, prompt_file, {**image, **example.settings}, count, lora_dir)
    options = RuntimeOptions(
        device,
        dtype,
        backend,
        ceiling(vram),
        None if ram is None else parse_bytes(ram) - (PREVIEW_BYTES if preview_decoder else 0),
        cache=not no_cache,
        compute=compute,
    )
    again = is_folder(out)
    if (workers or again) and (preview or preview_decoder or save_latents):
        raise UserError("neither --workers nor a folder goes with previews and latents", fix="name a file with -o")
    paths = (paths_in if again else _output_paths)(out, len(requests))
    if not again:  # in a folder nothing is replaced
        require_apart(_written(paths, save_latents, preview), requests)
    if workers or again:
        result = draw_many(Many(model, parts, requests, paths), workers, options, again)
        return print_json(result) if as_json else None

    with leaving_at_once():
        from ..api import open_named
        from ..checkpoint.hashes import FileHash
        from ..pipeline.drawing import Pipeline
    from .progress import phase_progress

    pipeline = Pipeline(open_named(model, parts), options, tell=_note)
    requests = [pipeline.complete(request) for request in requests]
    for note in (*_notes(model, pipeline), *example.notes(pipeline.model.name), *_words(prompts)):
        say(f"note: {note}")
    hashing = FileHash(list(pipeline.model.transformer.stamps), keep=not no_cache).start()
    on_latents = _saver(paths) if save_latents else None
    with phase_progress() as progress, previewing(preview, preview_decoder, pipeline) as on_step:
        for index, pixels in pipeline.images(requests, progress, on_step, on_latents):
            save(paths[index], pixels, pipeline.recipe(requests[index], pixels, hashing.result(_note)))
            say(f"{paths[index]}  seed {requests[index].seed}")
    images = {"images": [str(path) for path in paths], "seeds": [request.seed for request in requests]}
    result = {**images, **_measured(pipeline, requests)}
    say(_summary(result))
    if as_json:
        print_json(result)


def _note(line: str) -> None:
    say(f"note: {line}")


def _given(options: Mapping[str, Any]) -> set[str]:
    """Those that stand on the command line."""
    source = click.get_current_context().get_parameter_source
    return {name for name in options if source(name) is not ParameterSource.DEFAULT}


def _model(model: str | None, parts: Mapping[str, Path | None]) -> str | None:
    """The demo unless something else is named; None if all parts are files of their own."""
    named = [name for name, path in parts.items() if path is not None]
    if model is not None or not named:
        return model or DEMO
    if not set(COMPONENTS) <= set(named):
        raise UserError(
            "no model to take the other parts from",
            fix="name a folder with --model, or all of --transformer, --text-encoder and --vae",
        )
    return None


def _words(prompts: Sequence[str]) -> Iterator[str]:
    """Several prompts of one word each are probably one that nobody quoted."""
    if len(prompts) > 1 and not any(" " in prompt.strip() for prompt in prompts):
        yield f'these are {len(prompts)} prompts, a picture each; for one picture, quote it: "{" ".join(prompts)}"'


def _notes(model: str | None, pipeline: Pipeline) -> Iterator[str]:
    """What the user might not expect."""
    device = pipeline.hardware.device.type
    if pipeline.options.vram_bytes and device != "cuda":
        yield f"--vram has no effect on {device}, where all memory is --ram"
    encoder = pipeline.model.text_encoder
    if other := other_encoder(encoder.metadata, encoder.config):
        yield other
    if pipeline.model.transformer.unused:
        yield f"the transformer carries {said_of_unused(pipeline.model.transformer.unused)}, which has no effect"
    if pipeline.model.synthetic:
        yield f"{pipeline.model.name}: the weights are random, so the picture is noise"
    if model == DEMO:
        width, height = pipeline.model.default_size
        yield f"the built-in demo draws one simple shape at {width}x{height}; for Z-Image-Turbo, name it with --model"


def _output_paths(out: Path, count: int) -> list[Path]:
    """out itself, or out-1, out-2, ... ; checked before any work is done."""
    require_kind(out)
    digits = len(str(count))
    numbered = [out.with_name(f"{out.stem}-{i:0{digits}}{out.suffix}") for i in range(1, count + 1)]
    paths = [out] if count == 1 else numbered
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path} is a folder", fix="choose another name with -o")
    require_absent(paths[0], overwrite=True)
    return paths


def _written(paths: Sequence[Path], latents: bool, preview: str | None) -> Iterator[Path]:
    """All files that are replaced."""
    yield from paths
    if latents:
        yield from map(_latents_beside, paths)
    if preview:
        yield Path(preview)


def _latents_beside(path: Path) -> Path:
    return path.with_suffix(".latents.safetensors")


def _saver(paths: Sequence[Path]) -> Callable[[int, Tensor], None]:
    """Keeps latents beside the pictures."""
    from ..pipeline.latents import save_latents

    return lambda index, latent: save_latents(_latents_beside(paths[index]), latent)


def _measured(pipeline: Pipeline, requests: Sequence[GenerateOptions]) -> dict[str, Any]:
    meter = pipeline.meter
    return {
        **pipeline.computes_with(),
        "format": pipeline.model.transformer.main_format,
        "synthetic": pipeline.model.synthetic,
        "loras": [pipeline.adapters.told(request.loras) for request in requests],
        "controls": [pipeline.controls.told(request) for request in requests],
        "seconds_per_step": round(meter.phases["denoise"]["seconds"] / meter.steps, 3),
        "step_seconds": list(meter.step_seconds),
        "phases": {
            name: {"planned": plan.facts(), "measured": meter.phases[name]} for name, plan in pipeline.plans.items()
        },
        "peak_rss_bytes": peak_rss_bytes(),
        "planned_rss_bytes": max(plan.peak_ram_bytes for plan in pipeline.plans.values()),
    }


def _summary(result: dict[str, Any]) -> str:
    phases = result["phases"].items()
    seconds = "  ".join(f"{name} {phase['measured']['seconds']:.1f} s" for name, phase in phases)
    return (
        f"{seconds}  ({result['seconds_per_step']:.2f} s per step, peak memory {format_gb(result['peak_rss_bytes'])}, "
        f"{format_gb(result['planned_rss_bytes'])} were planned)"
    )
