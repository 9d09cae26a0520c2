"""What training a LoRA takes at the true width: memory part by part, and streamed against resident.

    python benchmarks/training.py --out benchmarks/results/train/full_width_cpu.json [--layers 3] [--size 256]

Layers of the true width in int8, random weights, beside a small text encoder and VAE. One process trains with all
blocks in memory, another within a ceiling that takes three of them away, which then stream; both report each step's
loss and seconds. A third counts the tensors of a step (tools/live_bytes.py). The last line is the JSON for --out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from full_size import machine
from PIL import Image

from zimage_lite import load, quantize
from zimage_lite.bench.machine import commit
from zimage_lite.config import TrainOptions, TransformerConfig
from zimage_lite.memory.meter import peak_rss_bytes
from zimage_lite.train.dataset import examples_in
from zimage_lite.train.optimizer import AdamW
from zimage_lite.train.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from live_bytes import LiveBytes  # noqa: E402
from make_checkpoint import SIZES, write_diffusers, write_tokenizer  # noqa: E402

STEP = ("block inputs", "activations", "unpacking")  # what comes and goes in a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--case", nargs=3, metavar=("NAME", "FOLDER", "RAM"), help="one run; used by the others")
    args = parser.parse_args()
    if args.case:
        name, folder, ram = args.case
        print(json.dumps(run(name, folder, ram, args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), args)
        resident, counted = (case(name, folder, "", args) for name in ("resident", "counted"))
        away = 3 * max(resident["block_bytes"].values())
        streamed = case("streamed", folder, f"{(resident['plan']['peak_ram_bytes'] - away) // 10**6}MB", args)
    report = {"machine": machine(), "commit": commit(), "resolution": args.size, "layers": args.layers}
    report |= {"rank": args.rank, "resident": resident, "streamed": streamed, "parts": counted["parts"]}
    report |= {
        "losses_equal": resident["losses"] == streamed["losses"] == counted["losses"],
        "time_ratio": round(min(streamed["seconds"]) / min(resident["seconds"]), 3),
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def make(folder: Path, args: argparse.Namespace) -> None:
    """The model, and two pictures."""
    _, encoder, vae = SIZES["tiny"]
    transformer = TransformerConfig(n_layers=args.layers, n_refiner_layers=1, cap_feat_dim=encoder.hidden_size)
    (folder / "bf16").mkdir()
    write_diffusers(folder / "bf16", (transformer, encoder, vae), torch.bfloat16, 0)
    write_tokenizer(folder / "bf16" / "tokenizer", "tiny")
    quantize(folder / "bf16", folder / "int8", "int8", text_encoder_to="keep")
    random = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for number in range(2):
        pixels = random.integers(0, 256, (args.size, args.size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number}.png")


def case(name: str, folder: str, ram: str, args: argparse.Namespace) -> dict[str, Any]:
    options = [f"--{key}={getattr(args, key)}" for key in ("layers", "size", "steps", "rank")]
    command = [sys.executable, __file__, "--case", name, folder, ram, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(name, {key: found[key] for key in ("losses", "seconds", "peak_rss_bytes")}, file=sys.stderr, flush=True)
    return found


def run(name: str, folder: str, ram: str, args: argparse.Namespace) -> dict[str, Any]:
    options = TrainOptions(steps=args.steps, rank=args.rank, resolution=args.size, trigger="glimm")
    pipeline = load(Path(folder) / "int8", device="cpu", cache=False, ram=ram or None)
    trainer = Trainer(pipeline, examples_in(Path(folder) / "pictures", "glimm"), options)
    trainer.prepare()
    trainer.begin()
    losses, seconds, at, live = list[float](), list[float](), time.perf_counter(), LiveBytes()
    with ExitStack() as stack:
        for loss in trainer.steps(0, args.steps):
            if name == "counted" and not losses:  # weights and gradients are there from now on
                stack.enter_context(live)
            losses.append(loss)
            seconds.append(round(time.perf_counter() - at, 2))
            at = time.perf_counter()
    plan = trainer.ways.plan
    return {
        "losses": losses, "seconds": seconds, "plan": plan.facts(), "block_bytes": dict(plan.sizes),
        "peak_rss_bytes": peak_rss_bytes(), "training": trainer.work.meter.phases["train"],
        "parts": parts(trainer, live.peak_bytes) if name == "counted" else None,
    }  # fmt: skip


def parts(trainer: Trainer, step_bytes: int) -> dict[str, dict[str, int]]:
    """Bytes of tensors, by what they are planned as. step_bytes: of all that were made in a step, at once."""
    plan, own, optimizer = trainer.ways.plan, trainer.lora.parameters, cast(AdamW, trainer.optimizer)
    counted = {
        "LoRA": size(own),
        "its gradients": size(half.grad for half in own),
        "its optimizer": size(tensor for pair in optimizer.moments for tensor in pair),
        "latents": size(trainer._latents),
        "captions": sum(size([told.tokens, *told.rope]) for told in trainer._captions.values()),
        "adaLN vectors": sum(size([own.noise_refiner, own.layers, own.final]) for own in trainer._times[1]),
        ", ".join(STEP): step_bytes,
    }
    planned = {**plan.fixed, ", ".join(STEP): sum(plan.fixed[name] for name in STEP)}
    return {name: {"planned": planned[name], "counted": counted[name]} for name in counted}


def size(tensors: Iterable[torch.Tensor | None]) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


if __name__ == "__main__":
    main()
