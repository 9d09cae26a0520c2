"""One step of the transformer at 256x256 on this CPU: in float32 and in 8 bits, and diffusers' in float32.

    python benchmarks/cpu_step.py --out benchmarks/results/NAME.json

Random weights, the same in all; `int8` is the format, quantized by our own writer. Ways take turns, so that what
disturbs one disturbs all; ratios are of medians. A step of ours takes captions and adaLN vectors that were made once
for all steps, as in `generate`; diffusers makes both in every step, so a block alone is timed too, without either.
The last line is the JSON that also goes to --out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from full_size import machine
from torch import Tensor

from zimage_lite.bench.machine import commit
from zimage_lite.config import TransformerConfig
from zimage_lite.model.compute import Compute
from zimage_lite.model.linear import bind
from zimage_lite.model.rope import grid_positions, rope_angles
from zimage_lite.model.transformer import Block, Transformer, is_time_weight
from zimage_lite.quant.formats import FORMATS
from zimage_lite.quant.tensor import QTensor

SIDE, CAPTION_TOKENS = 32, 32  # the latent of 256x256; a caption of up to 32 tokens
BAR = 1.5  # int8 against diffusers' float32

Ways = dict[str, Callable[[], Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    small = TransformerConfig(dim=1536, n_layers=4, n_heads=12)
    with torch.inference_mode():
        rows = [
            measured("step, 1536 wide, 4 layers and 2 + 2 refiners", steps(small), args.repeats),
            measured("block, 3840 wide", blocks(TransformerConfig(n_layers=1, n_refiner_layers=1)), args.repeats),
        ]
    report = {"machine": machine(), "commit": commit(), "tokens": tokens(), "rows": rows}
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def tokens() -> int:
    return SIDE**2 // 4 + CAPTION_TOKENS


def measured(name: str, ways: Ways, repeats: int) -> dict[str, Any]:
    results = {way: call() for way, call in ways.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, call in ways.items():
            start = time.perf_counter()
            call()
            seconds[way].append(time.perf_counter() - start)
    middle = {way: median(times) for way, times in seconds.items()}
    truth = results["diffusers float32"]
    row = {
        "what": name,
        "seconds": seconds,
        "median": middle,
        "faster_than_diffusers": {way: middle["diffusers float32"] / its for way, its in middle.items()},
        "relative_error": {way: float((result - truth).norm() / truth.norm()) for way, result in results.items()},
    }
    row["kept"] = row["faster_than_diffusers"]["int8"] >= BAR
    for way, ratio in row["faster_than_diffusers"].items():
        print(
            f"{name}: {way:<18} {middle[way]:.3f} s, {ratio:.2f}x, error {row['relative_error'][way]:.1e}", flush=True
        )
    return row


def steps(config: TransformerConfig) -> Ways:
    theirs = diffusers_model(config)
    latent, features = torch.randn(config.in_channels, SIDE, SIDE), torch.randn(CAPTION_TOKENS, config.cap_feat_dim)
    t = torch.tensor([0.5])

    def ours(name: str) -> Callable[[], Tensor]:
        model = Transformer(config, Compute(int8=name == "int8"))
        bind(model, packed(theirs.state_dict(), name), torch.float32)
        captions, (vectors,) = model.refine_captions([features]), model.modulations(t, torch.float32)
        return lambda: model([latent], captions, vectors)[0]

    def diffusers() -> Tensor:
        (answer,) = theirs([latent[:, None]], t, [features], return_dict=False)[0]
        return answer[:, 0]

    return {"diffusers float32": diffusers, "float32": ours("f32"), "int8": ours("int8")}


def blocks(config: TransformerConfig) -> Ways:
    theirs = diffusers_model(config).layers[0]
    x = torch.randn(tokens(), config.dim)
    condition = torch.randn(1, config.conditioning_dim)
    cos, sin = rope_angles(grid_positions((tokens(), 1, 1), (0, 0, 0)), config.axes_dims, config.rope_theta)
    mask, angles = torch.ones(1, tokens(), dtype=torch.bool), torch.complex(cos, sin)[None]

    def ours(name: str) -> Callable[[], Tensor]:
        block = Block(config)
        bind(block, packed(theirs.state_dict(), name), torch.float32)
        (vectors,), compute = block.modulation(condition), Compute(int8=name == "int8")
        return lambda: block(x, (cos, sin), [tokens()], vectors, compute)

    def diffusers() -> Tensor:
        return theirs(x[None], mask, angles, condition)[0]

    return {"diffusers float32": diffusers, "float32": ours("f32"), "int8": ours("int8")}


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
    """Matrices of the blocks in that format, the rest in float32, as `quantize` does."""
    chosen = {
        own: name
        if weight.ndim == 2 and not is_time_weight(own) and ("attention" in own or "feed_forward" in own)
        else "f32"
        for own, weight in state.items()
    }
    out = {}
    for own, weight in state.items():
        format = FORMATS[chosen[own]]
        options = format.codec.options(weight.shape[-1])
        out[own] = QTensor(format, tuple(weight.shape), format.codec.quantize(weight, options), options)
    return out


if __name__ == "__main__":
    main()
