"""What LoRAs cost on this CPU, and what of a small one is left on weights of few bits.

    python benchmarks/lora.py [--size 256] [--rank 32] [--formats int8 float32] --out benchmarks/results/NAME.json

First a step at true width (2 layers, 1 + 1 refiners) without, with one and with four LoRAs on every linear of its
blocks, taking turns; ratios are of medians. Then, for LoRAs of four sizes relative to the weight, the share of the
change that is there: applied beside the weights, as here, or merged into them and quantized again, as programs do that
patch a quantized model. The last line is the JSON that also goes to --out.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cpu_step import CAPTION_TOKENS, as_format, diffusers_model, packed, timed
from full_size import machine
from torch import Tensor
from zimage_kernels.integer_product import cpu_product

from zimage_lite.bench.machine import commit
from zimage_lite.config import TransformerConfig
from zimage_lite.model.compute import Compute
from zimage_lite.model.linear import Linear, attach, bind
from zimage_lite.model.side_path import SidePath
from zimage_lite.model.transformer import Transformer

COUNTS = (0, 1, 4)
RELATIVE = (0.003, 0.01, 0.03, 0.1)  # |dW| / |W|
MERGED = ("int8", "q8_0", "q4_0", "q4_k", "int4", "fp8")
MATRIX = 1024  # rows and columns
MOST = 1.05  # of a step without: the bar for one LoRA in int8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="of the square image (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--formats", nargs="+", default=["int8", "float32"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        steps = [step(name, args.size // 8, args.rank, args.repeats) for name in args.formats]
        left = [what_is_left(name) for name in MERGED]
    here = machine() | {"instructions": torch.backends.cpu.get_cpu_capability(), "int8_product": cpu_product()}
    report = {"machine": here, "commit": commit(), "size": args.size, "rank": args.rank, "steps": steps, "left": left}
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def step(name: str, side: int, rank: int, repeats: int) -> dict[str, Any]:
    """name: a format that is multiplied in 8 bits, or float32."""
    config, int8 = TransformerConfig(n_layers=2, n_refiner_layers=1), name == "int8"
    weights = packed(diffusers_model(config).state_dict(), "int8" if int8 else "f32")
    latent, features = torch.randn(config.in_channels, side, side), torch.randn(CAPTION_TOKENS, config.cap_feat_dim)
    ways = {}
    for count in COUNTS:
        model = Transformer(config, Compute(int8=int8))
        bind(model, weights, torch.float32)
        captions, (vectors,) = model.refine_captions([features]), model.modulations(torch.tensor([0.5]), torch.float32)
        attach(model, sides(model, count * rank) if count else {}, {})
        ways[f"{count} LoRAs"] = partial(model, [latent], captions, vectors)
    seconds = timed(ways, repeats)
    middle = {way: median(times) for way, times in seconds.items()}
    ratios = {way: its / middle["0 LoRAs"] for way, its in middle.items()}
    for way, ratio in ratios.items():
        print(f"{name}, {way}: {middle[way]:.3f} s, {ratio:.3f} of none", flush=True)
    return {"format": name, "seconds": seconds, "ratios": ratios, "kept": not int8 or ratios["1 LoRAs"] <= MOST}


def sides(model: Transformer, rank: int) -> dict[str, SidePath]:
    """On every linear of the blocks but those of the time, which are no part of a step."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name.startswith(("layers", "noise_refiner")) and "adaLN" not in name:
            rows, columns = module.weight.shape
            found[name] = SidePath(torch.randn(rank, columns) / columns**0.5, 0.01 * torch.randn(rows, rank))
    return found


def what_is_left(name: str) -> dict[str, Any]:
    """Of a change in the direction that was trained: 1 if all of it is there."""
    weight = torch.randn(MATRIX, MATRIX) / MATRIX**0.5
    stored = as_format(weight, name)
    held, found = stored.dequantize(), dict[str, dict[str, float]]()
    for relative in RELATIVE:
        a, b = torch.randn(16, MATRIX), torch.randn(MATRIX, 16)
        b *= relative * weight.norm() / (b @ a).norm()
        merged = as_format(held + b @ a, name).dequantize() - held
        linear = Linear(MATRIX, MATRIX)
        bind(linear, {"weight": stored}, torch.float32)
        before = linear(torch.eye(MATRIX))
        attach(linear, {"": SidePath(a, b)}, {})
        beside = (linear(torch.eye(MATRIX)) - before).T
        found[f"{relative:.1%}"] = {"beside": _share(beside, b @ a), "merged": _share(merged, b @ a)}
    said = (f"{size} {its['beside']:.2f} beside, {its['merged']:.2f} merged" for size, its in found.items())
    print(f"{name}: {', '.join(said)}", flush=True)
    return {"format": name, "share": found}


def _share(change: Tensor, wanted: Tensor) -> float:
    return float((change * wanted).sum() / wanted.square().sum())


if __name__ == "__main__":
    main()
