"""One step of the whole transformer at 1024x1024, its weights on the device: ours in 8 and in 16 bits, and diffusers'.

    python benchmarks/ops/bench_step.py [--out benchmarks/results/NAME.json]

Random weights, in ours the same codes. A step of ours takes the caption refined and the adaLN vectors made, as in the
pipeline; diffusers does both again in every step, which is 2 of its 34 blocks, over the 128 tokens of the caption
alone. No CUDA graphs. of_limit, work_bytes: see bench_block. difference_to_int8: of the answers in 16 and in 8 bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_linear_int8 import ceilings
from full_width import (
    CAPTION_TOKENS,
    CONFIG,
    DEVICE,
    DTYPE,
    IMAGE_TOKENS,
    LATENT,
    OURS,
    OURS16,
    cpu_ms,
    limit_ms,
    memory,
    per_call,
    random_weights,
    relative_error,
    unpacked,
)
from timing import need_cuda, report, spread
from torch import Tensor, nn

from zimage_lite.model.compute import Compute
from zimage_lite.model.linear import bind
from zimage_lite.model.transformer import Transformer, is_time_weight

DIFFUSERS = "bf16, diffusers"
LENGTHS = [IMAGE_TOKENS] * CONFIG.n_refiner_layers + [IMAGE_TOKENS + CAPTION_TOKENS] * CONFIG.n_layers


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Latent, time and caption features, the same every time."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    latent = torch.randn(CONFIG.in_channels, LATENT, LATENT, generator=generator, device=DEVICE).to(DTYPE)
    features = torch.randn(CAPTION_TOKENS, CONFIG.cap_feat_dim, generator=generator, device=DEVICE).to(DTYPE)
    return latent, torch.tensor([0.5], device=DEVICE), features


def step_row(name: str, call: Callable[[], Any], module: nn.Module, limit: float) -> dict[str, Any]:
    times = per_call(call, rep=1500)
    row = {"op": "step", "way": name, "tokens": IMAGE_TOKENS + CAPTION_TOKENS, **spread(times)}
    return row | {"cpu_ms": cpu_ms(call), "of_limit": limit / times[1]} | memory(call, module)


def our_step(name: str, rates: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """-> its row and what it computed. Both models are made of the same codes."""
    int8 = name == OURS
    torch.manual_seed(0)
    model = Transformer(CONFIG, Compute("triton", int8))
    weights = random_weights(model)
    if not int8:
        weights = unpacked(weights, DTYPE)
    bind(model, {own: weight for own, weight in weights.items() if is_time_weight(own)}, torch.float32)
    bind(model, {own: weight for own, weight in weights.items() if not is_time_weight(own)}, DTYPE)
    latent, time, features = inputs()
    captions, (vectors,) = model.refine_captions([features]), model.modulations(time, DTYPE)

    def call() -> Tensor:
        return model([latent], captions, vectors)[0]

    return step_row(name, call, model, limit_ms(LENGTHS, rates, int8, int8)), call()


def diffusers_step(rates: dict[str, Any]) -> dict[str, Any]:
    from diffusers import ZImageTransformer2DModel

    with torch.device(DEVICE):
        model = ZImageTransformer2DModel()  # of the true sizes; random
    model = model.to(DTYPE).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # the pad tokens were not initialised
            parameter.normal_(std=parameter.shape[1] ** -0.5)
    latent, time, features = inputs()
    limit = limit_ms([CAPTION_TOKENS] * CONFIG.n_refiner_layers + LENGTHS, rates, False, False)
    return step_row(DIFFUSERS, lambda: model([latent[:, None]], time, [features], return_dict=False), model, limit)


def steps(rates: dict[str, Any]) -> Iterator[dict[str, Any]]:
    found: dict[str, Tensor] = {}
    first_ms = 0.0
    for name in (OURS, OURS16, DIFFUSERS):
        try:
            if name == DIFFUSERS:
                row = diffusers_step(rates)
            else:
                row, found[name] = our_step(name, rates)
        except ImportError:
            row = {"op": "step", "way": name, "error": "not installed"}
        except Exception as error:  # noqa: BLE001 - a smaller card, or another version of diffusers
            row = {"op": "step", "way": name, "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        if "ms" in row:
            first_ms = first_ms or row["ms"]
            row["times_as_long"] = row["ms"] / first_ms
        if name == OURS16 and len(found) == 2:
            row["difference_to_int8"] = relative_error(found[OURS], found[OURS16])
        torch.cuda.empty_cache()
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    need_cuda()

    def rows() -> Iterator[dict[str, Any]]:
        rates = ceilings()
        yield rates
        yield from steps(rates)

    with torch.inference_mode():
        report(rows(), options.out)


if __name__ == "__main__":
    main()
