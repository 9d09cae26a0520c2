"""One step of the transformer on this CPU: in float32 and in 8 bits, and diffusers' in float32.

    python benchmarks/cpu_step.py [--size 512] [--formats int8 q8_0 ...] --out benchmarks/results/NAME.json

Random weights, the same in all, quantized by our own writer. Other formats than `int8` are re-encoded once, as with
`--compute int8` where blocks stay in memory, or unpacked before each product, as with `16bit`. Ways take turns, so that
what disturbs one disturbs all; ratios are of medians. A step of ours takes captions and adaLN vectors that were made
once for all steps, as in `generate`; diffusers makes both in every step: ours in float32 tells what that saves.
The last line is the JSON that also goes to --out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from full_size import machine
from torch import Tensor
from zimage_kernels.integer_product import cpu_product

from zimage_lite.bench.machine import commit
from zimage_lite.config import TransformerConfig
from zimage_lite.model.compute import Compute
from zimage_lite.model.linear import bind
from zimage_lite.model.transformer import Transformer, is_time_weight
from zimage_lite.plan.footprint import is_reencoded
from zimage_lite.quant.formats import FORMATS
from zimage_lite.quant.int8 import rotation_group
from zimage_lite.quant.tensor import QTensor

CAPTION_TOKENS = 32  # a caption of up to 32
BARS = {"torch": 1.5, "compiled": 1.0, "float32": 1.0}  # int8 against diffusers' float32, by what multiplies it

Ways = dict[str, Callable[[], Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="of the square image (default: %(default)s)")
    parser.add_argument("--formats", nargs="+", default=["int8"], help="default: int8")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    side = args.size // 8
    small, wide = TransformerConfig(dim=1536, n_layers=4, n_heads=12), TransformerConfig(n_layers=2, n_refiner_layers=1)
    with torch.inference_mode():
        rows = [
            measured("step, 1536 wide, 4 layers and 2 + 2 refiners", *steps(small, side, args.formats), args.repeats),
            measured("step, 3840 wide, 2 layers and 1 + 1 refiners", *steps(wide, side, args.formats), args.repeats),
        ]
    here = machine() | {"instructions": torch.backends.cpu.get_cpu_capability(), "int8_product": cpu_product()}
    report = {"machine": here, "commit": commit(), "tokens": side**2 // 4 + CAPTION_TOKENS, "rows": rows}
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def measured(name: str, ways: Ways, once: Ways, repeats: int) -> dict[str, Any]:
    results = {way: call() for way, call in ways.items()}
    seconds = timed(ways, repeats)
    middle = {way: median(times) for way, times in seconds.items()}
    truth = results["diffusers float32"]
    row = {
        "what": name,
        "seconds": seconds,
        "median": middle,
        "faster_than_diffusers": {way: middle["diffusers float32"] / its for way, its in middle.items()},
        "reencoding_seconds": {way: median(times) for way, times in timed(once, 3).items()},
        "relative_error": {way: float((result - truth).norm() / truth.norm()) for way, result in results.items()},
    }
    row["kept"] = row["faster_than_diffusers"]["int8"] >= BARS[cpu_product()]
    for way, ratio in row["faster_than_diffusers"].items():
        print(
            f"{name}: {way:<18} {middle[way]:.3f} s, {ratio:.2f}x, error {row['relative_error'][way]:.1e}", flush=True
        )
    for name_of, seconds_once in row["reencoding_seconds"].items():
        print(f"{name}: {name_of:<18} re-encoded once in {seconds_once:.3f} s", flush=True)
    return row


def timed(ways: Ways, repeats: int) -> dict[str, list[float]]:
    """Seconds of each, taking turns."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, call in ways.items():
            start = time.perf_counter()
            call()
            seconds[way].append(time.perf_counter() - start)
    return seconds


def steps(config: TransformerConfig, side: int, formats: Sequence[str]) -> tuple[Ways, Ways]:
    """side: of the latent. -> a step, and what is done once before the first."""
    theirs = diffusers_model(config)
    latent, features = torch.randn(config.in_channels, side, side), torch.randn(CAPTION_TOKENS, config.cap_feat_dim)
    t = torch.tensor([0.5])

    def ours(weights: dict[str, QTensor], int8: bool) -> Callable[[], Tensor]:
        model = Transformer(config, Compute(int8=int8))
        bind(model, weights, torch.float32)
        captions, (vectors,) = model.refine_captions([features]), model.modulations(t, torch.float32)
        return lambda: model([latent], captions, vectors)[0]

    def diffusers() -> Tensor:
        (answer,) = theirs([latent[:, None]], t, [features], return_dict=False)[0]
        return answer[:, 0]

    state = theirs.state_dict()
    once = Ways()
    ways = {"diffusers float32": diffusers, "float32": ours(packed(state, "f32"), False)}
    for name in formats:
        weights = packed(state, name)
        if name == "int8":
            ways[name] = ours(weights, True)
        else:
            ways[name] = ours({own: in_int8(weight) for own, weight in weights.items()}, True)
            ways[f"{name}, unpacked"] = ours(weights, False)
            once[name] = partial(lambda weights: [in_int8(weight) for weight in weights.values()], weights)
    return ways, once


def in_int8(weight: QTensor) -> QTensor:
    """Re-encoded in pieces, as when it is read; plain weights stay."""
    if not is_reencoded(weight.format):
        return weight
    codec, group = FORMATS["int8"].codec, {"group": rotation_group(weight.shape[1])}
    pieces = [codec.quantize(piece.dequantize(), group) for piece in weight.pieces()]
    parts = {suffix: torch.cat([piece[suffix] for piece in pieces]) for suffix in pieces[0]}
    return QTensor(FORMATS["int8"], weight.shape, parts, group)


def diffusers_model(config: TransformerConfig) -> Any:
    from diffusers import ZImageTransformer2DModel

    model = ZImageTransformer2DModel(
        dim=config.dim,
        n_layers=config.n_layers,
        n_refiner_layers=config.n_refiner_layers,
        n_heads=config.n_heads,
        n_kv_heads=config.n_heads,
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model.eval()


def packed(state: dict[str, Tensor], name: str) -> dict[str, QTensor]:
    """Matrices of the blocks in that format, the rest in float32."""
    chosen = {
        own: name
        if weight.ndim == 2 and not is_time_weight(own) and ("attention" in own or "feed_forward" in own)
        else "f32"
        for own, weight in state.items()
    }
    return {own: as_format(weight, chosen[own]) for own, weight in state.items()}


def as_format(weight: Tensor, name: str) -> QTensor:
    format = FORMATS[name]
    options = format.codec.options(weight.shape[-1])
    return QTensor(format, tuple(weight.shape), format.codec.quantize(weight, options, "fast"), options)


if __name__ == "__main__":
    main()
