"""Decodes one random latent whole, in bands, and with diffusers plain and tiled: peak memory, seconds, difference.
Or encodes one random picture.

    python benchmarks/vae.py --out benchmarks/results/NAME.json --sizes 256x256 512x512 [--half encoder]

The autoencoder has its true widths and random weights, the same for all. Each run is a process of its own; peak memory
is what the work added to its resident memory. `cpu_seconds` is the time of both cores, which other programs do not
lengthen much, as they do `seconds`. `counted` says how many bytes of tensors each way holds at
sizes too slow to run: the same code on the meta device. The last line is the JSON that also goes to --out.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from full_size import machine
from torch import nn

from zimage_lite.bench.machine import commit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from live_bytes import LiveBytes  # noqa: E402
from make_checkpoint import random_weights  # noqa: E402

from zimage_lite.config import VaeConfig  # noqa: E402
from zimage_lite.memory.meter import Meter, rss_bytes  # noqa: E402
from zimage_lite.memory.plan_vae import VaePlan, no_convolution, predict_decode, predict_encode  # noqa: E402
from zimage_lite.model.linear import bind, shapes  # noqa: E402
from zimage_lite.model.vae import HALVES, Decoder, Encoder  # noqa: E402
from zimage_lite.pipeline.decode import decode_as_planned  # noqa: E402
from zimage_lite.pipeline.picture import encode_as_planned  # noqa: E402
from zimage_lite.quant.formats import PLAIN_BY_DTYPE  # noqa: E402
from zimage_lite.quant.tensor import QTensor  # noqa: E402

WAYS = {
    "whole": VaePlan(),
    "bands": VaePlan(32),
    "bands, input computed again": VaePlan(32, store_input=False),
    "bands, all computed again": VaePlan(32, store_input=False, store_hidden=False),
}
PEERS = ("diffusers plain", "diffusers tiled")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
COUNTED = ((1024, 1024), (2048, 3072))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sizes", nargs="*", default=["256x256", "512x512"], help="HEIGHTxWIDTH")
    parser.add_argument("--half", choices=HALVES, default="decoder")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--ways", nargs="*", default=[*PEERS, *WAYS], help="the first is what the others differ from")
    parser.add_argument("--case", nargs=3, metavar=("WAY", "SIZE", "MADE"), help="one run; used by the others")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run(args.case[0], args.case[1], DTYPES[args.dtype], Path(args.case[2]), args.half)))
        return
    report = {"machine": machine(), "commit": commit(), "half": args.half, "dtype": args.dtype}
    report |= {"counted": counted(args.half), "runs": []}
    for size in args.sizes:
        report["runs"] += compared(args.half, size, args.dtype, args.ways)
        if args.out:
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def compared(half: str, size: str, dtype: str, ways: list[str]) -> list[dict[str, Any]]:
    """These ways at one size, and how far what each makes is from the first one's."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        truth = None
        for number, way in enumerate(ways):
            path = Path(folder) / f"{number}.pt"
            command = [sys.executable, __file__, "--half", half, "--dtype", dtype, "--case", way, size, str(path)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            image = torch.load(path).float()
            truth = image if truth is None else truth
            span = (truth.max() - truth.min()).item()
            error = (image - truth).abs().max().item() / span
            mse = (image - truth).square().mean().item()
            psnr = 10 * math.log10(span**2 / mse) if mse else None
            runs.append({**json.loads(done.stdout), "max_difference_of_range": error, "psnr_db": psnr})
            print(json.dumps(runs[-1]), file=sys.stderr)
    return runs


def run(way: str, size: str, dtype: torch.dtype, path: Path, half: str) -> dict[str, Any]:
    given = input_of(half, *map(int, size.split("x")))
    if way in PEERS:
        compute = diffusers_half(half, dtype, way, min(map(int, size.split("x"))) // 2)
    else:
        compute = our_half(half, dtype, WAYS[way])
    with torch.inference_mode():
        compute(given[:, :32, :32] if half == "encoder" else given[:, :4, :4])  # what is loaded and compiled first
        before, start, meter = rss_bytes(), time.process_time(), Meter()
        with meter.phase("vae"):
            made = compute(given)
        cpu_seconds = time.process_time() - start
    torch.save(made, path)
    seconds, peak = meter.phases["vae"]["seconds"], int(meter.phases["vae"]["peak_rss_bytes"] - before)
    return {"way": way, "size": size, "seconds": seconds, "cpu_seconds": round(cpu_seconds, 1), "peak_bytes": peak}


def input_of(half: str, height: int, width: int) -> torch.Tensor:
    """A picture in [-1, 1], or a latent."""
    generator = torch.Generator().manual_seed(0)
    if half == "encoder":
        return torch.rand(3, height, width, generator=generator).mul_(2).sub_(1)
    return torch.randn(16, height // 8, width // 8, generator=generator)


def weights(half: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: torch.cat(list(random_weights("vae", name, shape, 0))).view(shape) for name, shape in shapes(half).items()
    }


def bound(half: nn.Module, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> nn.Module:
    plain = PLAIN_BY_DTYPE[{torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]]
    bind(half, {name: QTensor(plain, tuple(t.shape), {"": t.to(dtype)}) for name, t in tensors.items()}, dtype)
    return half


def our_half(half: str, dtype: torch.dtype, way: VaePlan) -> Any:
    made = HALVES[half](VaeConfig())
    bound(made, weights(made), dtype)
    return partial(as_planned, made, dtype, way)


def as_planned(half: Encoder | Decoder, dtype: torch.dtype, way: VaePlan, given: torch.Tensor) -> torch.Tensor:
    """An image, or the moments of a posterior."""
    if isinstance(half, Encoder):
        return encode_as_planned(half, given.to(dtype), way)
    return decode_as_planned(half, given, way)


def diffusers_half(half: str, dtype: torch.dtype, way: str, tile: int, device: str = "cpu") -> Any:
    """tile: its edge in pixels; diffusers' own is 1024, which would not cut an image of that size or less."""
    from diffusers import AutoencoderKL

    c = VaeConfig()
    levels = len(c.block_out_channels)
    with torch.device(device):
        vae = AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=16, block_out_channels=c.block_out_channels,
            layers_per_block=c.layers_per_block, down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels, norm_num_groups=c.norm_num_groups, use_quant_conv=False,
            use_post_quant_conv=False,
        )  # fmt: skip
    if device != "meta":
        getattr(vae, half).load_state_dict(weights(HALVES[half](c)))
    setattr(vae, "decoder" if half == "encoder" else "encoder", None)
    vae = vae.to(dtype).eval()
    if way == "diffusers tiled":
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // 8
    if half == "encoder":
        return lambda image: vae.encode(image.unsqueeze(0).to(dtype)).latent_dist.parameters[0]
    return lambda latent: vae.decode((latent / c.scaling_factor + c.shift_factor).unsqueeze(0).to(dtype)).sample[0]


def counted(half: str) -> list[dict[str, Any]]:
    """Bytes of tensors at their peak, weights not included."""
    rows, predict = [], predict_encode if half == "encoder" else predict_decode
    for (height, width), dtype in product(COUNTED, DTYPES.values()):
        of = {"size": f"{height}x{width}", "dtype": str(dtype).removeprefix("torch.")}
        given = torch.empty_like(input_of(half, height, width), device="meta")
        for name in PEERS:
            theirs = diffusers_half(half, dtype, name, min(height, width) // 2, "meta")
            rows.append({"way": name, **of, "peak_bytes": peak_bytes(theirs, given)})
        made = HALVES[half](VaeConfig())
        bound(made, {name: torch.empty(shape, device="meta") for name, shape in shapes(made).items()}, dtype)
        for name, way in WAYS.items():
            peak = peak_bytes(partial(as_planned, made, dtype, way), given)
            predicted = predict(VaeConfig(), height, width, dtype.itemsize, way, no_convolution).device_bytes
            rows.append({"way": name, **of, "peak_bytes": peak, "predicted_bytes": predicted})
    return rows


def peak_bytes(compute: Any, given: torch.Tensor) -> int:
    with torch.inference_mode(), LiveBytes() as live:
        compute(given)
    return live.peak_bytes


if __name__ == "__main__":
    main()
