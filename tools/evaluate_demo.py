"""How often the demo model draws what a caption asks: held-out captions, eight steps, judged by demo_judge.py.

The sampler is an argument, a function (caption, seed) -> picture, so that any runtime and any weight format can be
measured against the same captions and seeds: ours or diffusers' ZImagePipeline, in float32 on the CPU.

    python tools/evaluate_demo.py --sheet sheet.png                      the built-in model
    python tools/evaluate_demo.py --formats q8_0 q4_0 int8 --levels one  the same, converted
    python tools/evaluate_demo.py --formats q4_k_m --sampler re-encoded  multiplied in 8 bits, as on a GPU

The last line printed is one JSON object: format and level -> share of right answers per part, in per cent.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from demo_judge import Verdict, judge
from demo_scenes import LEVELS, Scene, held_out_captions
from PIL import Image

from zimage_lite import quantize
from zimage_lite.checkpoint.model_card import DEMO, model_folder

Sampler = Callable[[str, int], Image.Image]
PARTS = ("all", "background", "colours", "shapes", "places", "words")
AS_IT_IS = "bf16"  # the demo's own format
FIRST_SEED = 1000  # the seeds count up from here, caption by caption

README = """# Z-Image demo model

A very small model of Z-Image-Turbo's architecture (S3-DiT, Qwen3 text encoder, Flux-style VAE), trained from scratch by
`tools/train_demo.py` without anybody else's weights or pictures. It exists to show and to test the software.

- Pictures: {default_width}x{default_height}, {default_steps} steps, no guidance.
- Prompts: "a red circle on a blue background", "蓝色背景上的红色圆形" and the like; anything else gives nonsense.
- Training data: pictures drawn on the fly ({data}).
- Training: {denoiser_steps} denoiser steps, seed {seed}; all settings and losses stand in card.json.
- Licence: {license}.
"""


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_card(folder: Path, card: dict) -> None:
    """The model card: card.json for programs, and README.md for people, with the evaluation once there is one."""
    write_json(folder / "card.json", card)
    text = README.format(**card, denoiser_steps=card["steps"]["denoiser"])
    if "evaluation" in card:
        text += "\nRight answers in per cent, on captions whose combinations training never saw, computed in float32.\n"
        text += "The recipe was chosen with an eye on these captions, so the figures may flatter it a little.\n\n"
        text += f"| level | captions | {' | '.join(PARTS)} |\n|{'---|' * (len(PARTS) + 2)}\n"
        for level, row in card["evaluation"].items():
            text += f"| {level} | {row['captions']} | {' | '.join(str(row[part]) for part in PARTS)} |\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def own_sampler(folder: Path, steps: int, reencoded: bool = False) -> Sampler:
    """zimage-lite on a model folder, at the size its card names, the same on every CPU: weights are unpacked, or
    all re-encoded to int8."""
    from zimage_lite import GenerateOptions, load
    from zimage_lite.checkpoint.model_card import default_size

    pipeline = load(folder, device="cpu", compute="int8" if reencoded else "16bit")
    width, height = default_size(folder)

    def sample(caption: str, seed: int) -> Image.Image:
        request = GenerateOptions(caption, width, height, steps=steps, seed=seed)
        return Image.fromarray(pipeline.generate([request])[0].numpy())

    return sample


def diffusers_sampler(folder: Path, steps: int) -> Sampler:
    """ZImagePipeline on a model folder, at the size its card names; noise from a CPU generator with the given seed."""
    import torch
    from diffusers import ZImagePipeline

    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    pipeline = ZImagePipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    size = {"width": card["default_width"], "height": card["default_height"]}

    def sample(caption: str, seed: int) -> Image.Image:
        generator = torch.Generator("cpu").manual_seed(seed)
        # 64 tokens hold every caption of the grammar; the default of 512 would mostly encode padding.
        options = {"num_inference_steps": steps, "guidance_scale": 0.0, "max_sequence_length": 64, **size}
        return pipeline(caption, generator=generator, **options).images[0]

    return sample


SAMPLERS = {
    "zimage-lite": own_sampler,
    "re-encoded": partial(own_sampler, reencoded=True),
    "diffusers": diffusers_sampler,
}


def evaluate(
    sampler: Sampler, captions: list[tuple[str, Scene]], font: str | None = None
) -> tuple[dict[str, float], list[tuple[str, Image.Image, Verdict]]]:
    """Share of captions shown right, per part, in per cent; and what was drawn, for a look at it."""
    drawn = []
    for number, (caption, scene) in enumerate(captions):
        picture = sampler(caption, FIRST_SEED + number)
        drawn.append((caption, picture, judge(picture, scene, font)))
    figures = {
        part: round(100 * sum(getattr(verdict, part) for _, _, verdict in drawn) / len(drawn), 1) for part in PARTS
    }
    return figures, drawn


def contact_sheet(drawn: list[tuple[str, Image.Image, Verdict]], columns: int = 20) -> Image.Image:
    """All pictures in rows; those with a mistake have a red bar below."""
    side = drawn[0][1].width
    rows = -(-len(drawn) // columns)
    sheet = Image.new("RGB", (columns * (side + 4), rows * (side + 8)), "white")
    for number, (_, picture, verdict) in enumerate(drawn):
        left, top = number % columns * (side + 4), number // columns * (side + 8)
        sheet.paste(picture, (left, top))
        if not verdict.all:
            sheet.paste("red", (left, top + side, left + side, top + side + 5))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO, help="folder of the model, with its card.json (default: %(default)s)")
    parser.add_argument("--sampler", choices=SAMPLERS, default="zimage-lite", help="(default: %(default)s)")
    parser.add_argument("--formats", nargs="+", default=[], help="convert to these first, and compare")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=["one", "two"], help="(default: one two)")
    parser.add_argument("--count", type=int, default=200, help="captions per level (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="Euler steps (default: %(default)s)")
    parser.add_argument("--font", help="font file the words were drawn with; needed for level full")
    parser.add_argument("--sheet", type=Path, help="save a contact sheet per level: NAME.png becomes NAME-one.png, ...")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--write-card", action="store_true", help="put the figures into the model's card.json")
    options = parser.parse_args()
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    model, report = model_folder(options.model), {}
    print(f"{'format':8} {'level':6}", *(f"{part:>10}" for part in PARTS), f"{'s/picture':>10}")
    with TemporaryDirectory() as work:
        for name in (AS_IT_IS, *options.formats):
            folder = model
            if name != AS_IT_IS:
                folder = Path(work) / name
                quantize(model, folder, name)
            sampler = SAMPLERS[options.sampler](folder, options.steps)
            report[name] = {level: measure(sampler, name, level, options) for level in options.levels}
    if options.write_card:
        card = json.loads((model / "card.json").read_text(encoding="utf-8"))
        write_card(model, {**card, "evaluation": report[AS_IT_IS]})
    print(json.dumps(report))


def measure(sampler: Sampler, name: str, level: str, options: argparse.Namespace) -> dict[str, float]:
    """Evaluate one format on one level: prints a line, saves the sheet."""
    started = time.perf_counter()
    figures, drawn = evaluate(sampler, held_out_captions(level, options.count), options.font)
    seconds = (time.perf_counter() - started) / len(drawn)
    print(f"{name:8} {level:6}", *(f"{figures[part]:10.1f}" for part in PARTS), f"{seconds:10.2f}", flush=True)
    if options.sheet:
        contact_sheet(drawn).save(options.sheet.with_stem(f"{options.sheet.stem}-{name}-{level}"))
    return {"captions": len(drawn), **figures}


if __name__ == "__main__":
    main()
