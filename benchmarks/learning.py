"""Whether train-lora teaches the demo a shape that it does not know, and what it unlearns meanwhile.

    python benchmarks/learning.py --out benchmarks/results/train/learning_cpu.json [--formats bf16 int8 q4_k_m]

20 drawn hourglasses, called bows, with English captions, and prompts of the demo's own grammar, none of them asked for
afterwards, that are to be preserved. Then tools/demo_judge.py says of how many pictures, in per cent, they show what
was asked for: bows of 50 prompts with the trigger, with a known shape in its place, and with the trigger but no LoRA;
and 100 captions that the demo is always judged by, with the LoRA and without it. The last line is the JSON that also
goes to --out, kept after each format.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from full_size import machine
from PIL import Image

from zimage_lite import GenerateOptions, Lora, load, quantize
from zimage_lite.bench.machine import commit
from zimage_lite.checkpoint.model_card import DEMO, model_folder

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import demo_judge  # noqa: E402
import demo_scenes  # noqa: E402
from demo_scenes import COLOURS, LANGUAGES, SHAPES, Scene, Thing, caption, held_out_captions, random_scene  # noqa: E402
from train_demo_lora import HOURGLASS  # noqa: E402

# A short word: the demo's tokenizer spells those it does not know in bytes, which its text encoder has never read.
# "hourglass" is 9 tokens, behind which it misreads the background: colours were wrong in a fifth of the pictures.
TRIGGER, PICTURES, PRESERVED = "bow", 20, 240
AS_IT_IS = "bf16"
OPTIONS = (
    "--steps", "1600", "--rate", "3e-3", "--rate-schedule", "cosine", "--batch", "4", "--rank", "16",
    "--timesteps", "uniform", "--shift", "3", "--every", "1600", "--preserve-weight", "6",
)  # fmt: skip
Asked = list[tuple[str, Scene]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=[AS_IT_IS, "int8", "q4_k_m"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    know_the_shape()
    report: dict[str, Any] = {"machine": machine(), "commit": commit(), "options": OPTIONS, "formats": {}}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_lessons(work / "lessons", work / "preserve.txt")
        for name in args.formats:
            report["formats"][name] = taught(name, work)
            print(name, report["formats"][name], flush=True)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def know_the_shape() -> None:
    """For scenes to be drawn with it, and for the judge, who tells it from all others."""
    demo_scenes._OUTLINES[TRIGGER] = HOURGLASS
    drawn = np.asarray(demo_scenes.shape_mask(Thing(TRIGGER, "red", r=0.48), 256)) > 0
    demo_judge._TEMPLATES[TRIGGER] = demo_judge._outline(drawn)


def write_lessons(folder: Path, prompts: Path) -> None:
    """Every colour two or three times as that of the shape, and of the background."""
    folder.mkdir()
    rng, colours = np.random.default_rng(0), tuple(COLOURS)
    pairs = [(colours[i], colours[(i + offset) % 8]) for offset in (1, 3, 6) for i in range(8)]
    for number, (colour, ground) in enumerate(pairs[:PICTURES]):
        (x, y), r = rng.uniform(0.47, 0.53, 2), rng.uniform(0.28, 0.32)
        scene = Scene((ground,), (Thing("circle", colour, x=x, y=y, r=r),))
        text = caption(scene, rng, "en").replace("circle", TRIGGER)
        drawn = replace(scene, things=(replace(scene.things[0], shape=TRIGGER),))
        demo_scenes.draw(drawn, 64).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(text + "\n", encoding="utf-8")
    rng = np.random.default_rng(3)
    lines = [caption(random_scene(rng, "one"), rng, LANGUAGES[i % 2]) for i in range(PRESERVED)]
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")


def taught(name: str, work: Path) -> dict[str, Any]:
    model = model_folder(DEMO) if name == AS_IT_IS else work / name
    if name != AS_IT_IS:
        quantize(DEMO, model, name)
    lora, before = work / f"{name}.safetensors", processor_seconds()
    command = [sys.executable, "-m", "zimage_lite", "train-lora", work / "lessons", "--model", model, "-o", lora]
    command += ["--trigger", TRIGGER, "--preserve-prompts", work / "preserve.txt", "--json", *OPTIONS]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    seconds = {"processor_seconds": round(processor_seconds() - before)}
    memory = {"planned": said["planned_ram_bytes"], "measured": said["measured"]["peak_rss_bytes"]}
    return {**judged(str(model), str(lora)), **seconds, "ram_bytes": memory}


def processor_seconds() -> float:
    """Of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def judged(model: str, lora: str) -> dict[str, float]:
    """Per cent of the pictures that show what was asked for."""
    pipeline, taught = load(model, device="cpu"), (Lora(lora),)

    def right(asked: Asked, seed: int, loras: tuple[Lora, ...]) -> float:
        requests = [GenerateOptions(text, 64, 64, seed=seed + i, loras=loras) for i, (text, _) in enumerate(asked)]
        pictures = [Image.fromarray(pixels.numpy()) for pixels in pipeline.generate(requests)]
        verdicts = [demo_judge.judge(picture, scene) for picture, (_, scene) in zip(pictures, asked, strict=True)]
        return 100 * float(np.mean([verdict.all for verdict in verdicts]))

    new, old = new_prompts(), held_out_captions("one", count=100)
    plain = [(text.replace(TRIGGER, SHAPES[i % 7]), scene) for i, (text, scene) in enumerate(new)]
    return {
        "with the trigger": right(new, 0, taught),
        "without the trigger": right(plain, 0, taught),
        "LoRA off": right(new, 0, ()),
        "earlier captions": right(old, 1000, taught),
        "earlier captions, LoRA off": right(old, 1000, ()),
    }


def new_prompts() -> Asked:
    pairs = [(colour, ground) for colour in COLOURS for ground in COLOURS if colour != ground]
    return [
        (f"a {colour} {TRIGGER} on a {ground} background", Scene((ground,), (Thing(TRIGGER, colour),)))
        for colour, ground in pairs[:50]
    ]


if __name__ == "__main__":
    main()
