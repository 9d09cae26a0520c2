"""What previews cost on this CPU: a step of all blocks at full width, and after it nothing or a preview.

    python benchmarks/previews.py [--size 256] [--out benchmarks/results/NAME.json]

The 30 layers and 2 refiners share one block's int8 weights, which are as many bytes to read as different ones, for no
cache holds them. Ways take turns; ratios are of medians; steps of a machine that does other things differ by more than
a preview takes, so that is timed alone as well. TAEF1 has random weights. The last line is the JSON that also goes to
--out.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from cpu_step import CAPTION_TOKENS, diffusers_model, packed, timed
from full_size import machine
from safetensors.torch import save_file
from torch import Tensor
from zimage_kernels.integer_product import cpu_product

from zimage_lite.bench.machine import commit
from zimage_lite.checkpoint.model_card import DEMO, model_folder
from zimage_lite.checkpoint.model_files import open_model
from zimage_lite.cli.previews import previewing
from zimage_lite.config import RuntimeOptions, TransformerConfig
from zimage_lite.model.compute import Compute
from zimage_lite.model.linear import bind
from zimage_lite.model.transformer import Transformer
from zimage_lite.pipeline.denoise import Step
from zimage_lite.pipeline.drawing import Pipeline

MOST = 1.02  # of a step without; told by the preview alone, as two steps differ by more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="of the square image (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        taef1 = Path(folder) / "taef1.safetensors"
        write_taef1(taef1)
        step, x0 = full_step(args.size // 8), torch.randn(16, args.size // 8, args.size // 8)
        pipeline = Pipeline(open_model(model_folder(DEMO)), RuntimeOptions("cpu"))
        file = str(Path(folder) / "preview.png")
        with previewing(file, None, pipeline) as colours, previewing(file, taef1, pipeline) as decoded:
            ways = {"none": None, "colours": colours, "TAEF1": decoded}
            alone = timed({name: after(lambda: None, look, x0) for name, look in ways.items()}, 20)
            seconds = timed({name: after(step, look, x0) for name, look in ways.items()}, args.repeats)
    middle = {way: median(times) for way, times in seconds.items()}
    ratios = {way: its / middle["none"] for way, its in middle.items()}
    shares = {way: median(times) / middle["none"] for way, times in alone.items()}
    for way, ratio in ratios.items():
        print(f"{way}: {middle[way]:.3f} s, {ratio:.3f} of none; the preview alone {shares[way]:.5f} of it", flush=True)
    here = machine() | {"instructions": torch.backends.cpu.get_cpu_capability(), "int8_product": cpu_product()}
    kept = shares["colours"] <= MOST - 1
    report = {
        "machine": here,
        "commit": commit(),
        "size": args.size,
        "seconds": seconds,
        "ratios": ratios,
        "alone": {way: round(share, 5) for way, share in shares.items()},  # of a step without
        "kept": kept,
    }
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def after(step: Callable[[], object], look: Callable[[Step], None] | None, x0: Tensor) -> Callable[[], None]:
    """As a step of the pipeline ends: called if anybody looks."""

    def both() -> None:
        step()
        if look:
            look(Step(0, 1, 8, 1.0, x0))

    return both


def full_step(side: int) -> Callable[[], object]:
    """side: of the latent."""
    whole, one = TransformerConfig(), TransformerConfig(n_layers=1, n_refiner_layers=1)
    weights = packed(diffusers_model(one).state_dict(), "int8")
    model = Transformer(whole, Compute(int8=True))
    for k in range(whole.n_layers):  # the refiners have but two each
        bind(
            model,
            {re.sub(r"^layers\.0", f"layers.{k}", name): weight for name, weight in weights.items()},
            torch.float32,
        )
    for k in range(whole.n_refiner_layers):
        bind(model, {re.sub(r"refiner\.0", f"refiner.{k}", name): w for name, w in weights.items()}, torch.float32)
    latent, features = torch.randn(16, side, side), torch.randn(CAPTION_TOKENS, whole.cap_feat_dim)
    captions, (vectors,) = model.refine_captions([features]), model.modulations(torch.tensor([0.5]), torch.float32)
    return partial(model, [latent], captions, vectors)


def write_taef1(path: Path) -> None:
    from diffusers import AutoencoderTiny

    theirs = AutoencoderTiny(latent_channels=16, scaling_factor=1.0, shift_factor=0.0)
    save_file(theirs.state_dict(), path)


if __name__ == "__main__":
    main()
