"""What a LoRA costs where blocks stream from the disk, from none that stays to all, on this CPU.

    python benchmarks/lora_streaming.py [--rank 32] [--size 256] --out benchmarks/results/lora/NAME.json

A transformer of the true width (4 layers, 1 + 1 refiners, int8, random weights) draws through the whole pipeline with
and without a LoRA on every linear, taking turns, within less and less RAM, with as many blocks that stay in both.
Ratios are of the medians of steps but the first, which loads. Bar: 1.05 everywhere. The last line is the JSON that also
goes to --out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cpu_step import CAPTION_TOKENS
from full_size import machine
from zimage_kernels.integer_product import cpu_product

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests" / "helpers")]

from make_checkpoint import SIZES, write_diffusers, write_tokenizer  # noqa: E402
from trained_loras import save_lora  # noqa: E402

from zimage_lite.api import quantize  # noqa: E402
from zimage_lite.bench.machine import commit  # noqa: E402
from zimage_lite.checkpoint.model_files import open_model  # noqa: E402
from zimage_lite.config import GenerateOptions, RuntimeOptions, TransformerConfig  # noqa: E402
from zimage_lite.errors import BudgetError  # noqa: E402
from zimage_lite.memory.plan import DEVICE  # noqa: E402
from zimage_lite.pipeline.drawing import Pipeline  # noqa: E402

CONFIG = TransformerConfig(n_layers=4, n_refiner_layers=1, cap_feat_dim=128)
BLOCKS = CONFIG.n_layers + CONFIG.n_refiner_layers
MOST = 1.05
VARIES = 60_000_000  # bytes, by which the process itself differs from run to run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--size", type=int, default=256, help="of the square image (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, lora = made(Path(folder), args.rank)
        image = GenerateOptions("x" * (CAPTION_TOKENS // 2), args.size, args.size, steps=args.steps)
        images = {"none": image, "LoRA": replace(image, loras=(str(lora),))}
        free = {way: drawn(model, one, None)[1] for way, one in images.items()}
        rows = list[dict[str, Any]]()
        for gone in range(BLOCKS + 1):
            away = gone * max(free["none"].sizes.values())
            most = free["none"].peak_ram_bytes - away + VARIES
            more = sum(free["LoRA"].fixed.values()) - sum(free["none"].fixed.values())
            rams = {"none": most, "LoRA": most + more} if gone else dict.fromkeys(images)
            try:
                rows.append(compared(model, images, rams, args.rounds))
            except BudgetError as error:  # slots for the others take more than those that have gone
                print(error, flush=True)
                break
            print(told(rows[-1]), flush=True)
    here = machine() | {"instructions": torch.backends.cpu.get_cpu_capability(), "int8_product": cpu_product()}
    report = {"machine": here, "commit": commit(), "rank": args.rank, "size": args.size, "rows": rows}
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def made(folder: Path, rank: int) -> tuple[Path, Path]:
    """-> a model folder and a LoRA for it."""
    source, model = folder / "source", folder / "int8"
    source.mkdir()
    write_diffusers(source, (CONFIG, *SIZES["tiny"][1:]), torch.bfloat16, seed=0)
    write_tokenizer(source / "tokenizer", "tiny")
    quantize(source, model, "int8")
    return model, save_lora(folder / "lora.safetensors", CONFIG, rank)


def drawn(model: Path, image: GenerateOptions, ram: int | None) -> tuple[list[float], Any]:
    """-> seconds of the steps but the first, the plan."""
    pipeline = Pipeline(open_model(model), RuntimeOptions("cpu", ram_bytes=ram, compute="int8", cache=False))
    pipeline.generate([image])
    return list(pipeline.meter.step_seconds)[1:], pipeline.plans["denoise"]


def compared(
    model: Path, images: dict[str, GenerateOptions], rams: dict[str, int | None], rounds: int
) -> dict[str, Any]:
    """With a LoRA within as much more memory as it takes."""
    seconds: dict[str, list[float]] = {way: [] for way in images}
    stay, keeps = {}, False
    for _ in range(rounds):
        for way, image in images.items():
            some, plan = drawn(model, image, rams[way])
            seconds[way] += some
            stay[way] = list(plan.homes.values()).count(DEVICE)
            keeps = plan.keeps
    ratio = median(seconds["LoRA"]) / median(seconds["none"])
    return {
        "ram_bytes": rams,
        "blocks_that_stay": stay,
        "adapters_stay": keeps,
        "seconds": seconds,
        "ratio": ratio,
        "kept": ratio <= MOST,
    }


def told(row: dict[str, Any]) -> str:
    stay, of = row["blocks_that_stay"], f"of {BLOCKS} blocks stay"
    middle = {way: median(times) for way, times in row["seconds"].items()}
    of += ", and what the LoRA adds" if row["adapters_stay"] else ""
    return f"{stay['none']} and {stay['LoRA']} {of}: {middle['none']:.3f} s, {middle['LoRA']:.3f} s, {row['ratio']:.3f}"


if __name__ == "__main__":
    main()
