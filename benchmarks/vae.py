"""Decodes one random latent whole, in bands, and with diffusers plain and tiled: peak memory, seconds, difference.

    python benchmarks/vae.py --out benchmarks/results/NAME.json --sizes 256x256 512x512

The autoencoder has its true widths and random weights, the same for all. Each run is a process of its own; peak memory
is what the decode added to its resident memory. `cpu_seconds` is the time of both cores, which other programs do not
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
from pathlib import Path
from typing import Any

import torch
from full_size import machine

from zimage_lite.bench.machine import commit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from live_bytes import LiveBytes  # noqa: E402
from make_checkpoint import random_weights  # noqa: E402

from zimage_lite.config import VaeConfig  # noqa: E402
from zimage_lite.memory.meter import Meter, rss_bytes  # noqa: E402
from zimage_lite.memory.plan_vae import VaePlan, no_convolution, predict_decode  # noqa: E402
from zimage_lite.model.linear import bind, shapes  # noqa: E402
from zimage_lite.model.vae import Decoder  # noqa: E402
from zimage_lite.pipeline.decode import decode_as_planned  # noqa: E402
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
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--ways", nargs="*", default=[*PEERS, *WAYS], help="the first is what the others differ from")
    parser.add_argument("--case", nargs=3, metavar=("WAY", "SIZE", "IMAGE"), help="one run; used by the others")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run(args.case[0], args.case[1], DTYPES[args.dtype], Path(args.case[2]))))
        return
    report = {"machine": machine(), "commit": commit(), "dtype": args.dtype, "counted": counted(), "runs": []}
    for size in args.sizes:
        report["runs"] += compared(size, args.dtype, args.ways)
        if args.out:
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def compared(size: str, dtype: str, ways: list[str]) -> list[dict[str, Any]]:
    """These ways at one size, and how far each image is from the first one's."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        truth = None
        for number, way in enumerate(ways):
            path = Path(folder) / f"{number}.pt"
            command = [sys.executable, __file__, "--dtype", dtype, "--case", way, size, str(path)]
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


def run(way: str, size: str, dtype: torch.dtype, path: Path) -> dict[str, Any]:
    height, width = map(int, size.split("x"))
    latent = torch.randn(16, height // 8, width // 8, generator=torch.Generator().manual_seed(0))
    decode = diffusers_decoder(dtype, way, min(height, width) // 2) if way in PEERS else our_decoder(dtype, WAYS[way])
    with torch.inference_mode():
        decode(latent[:, :4, :4])  # what the libraries load and compile on first use
        before, start, meter = rss_bytes(), time.process_time(), Meter()
        with meter.phase("decode"):
            image = decode(latent)
        cpu_seconds = time.process_time() - start
    torch.save(image, path)
    seconds, peak = meter.phases["decode"]["seconds"], int(meter.phases["decode"]["peak_rss_bytes"] - before)
    return {"way": way, "size": size, "seconds": seconds, "cpu_seconds": round(cpu_seconds, 1), "peak_bytes": peak}


def weights(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {
        name: torch.cat(list(random_weights("vae", name, shape, 0))).view(shape)
        for name, shape in shapes(decoder).items()
    }


def bound(decoder: Decoder, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> Decoder:
    plain = PLAIN_BY_DTYPE[{torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]]
    bind(decoder, {name: QTensor(plain, tuple(t.shape), {"": t.to(dtype)}) for name, t in tensors.items()}, dtype)
    return decoder


def our_decoder(dtype: torch.dtype, way: VaePlan) -> Any:
    decoder = Decoder(VaeConfig())
    bound(decoder, weights(decoder), dtype)
    return lambda latent: decode_as_planned(decoder, latent, way)


def diffusers_decoder(dtype: torch.dtype, way: str, tile: int) -> Any:
    """tile: its edge in pixels; diffusers' own is 1024, which would not cut an image of that size or less."""
    from diffusers import AutoencoderKL

    c = VaeConfig()
    levels = len(c.block_out_channels)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=16, block_out_channels=c.block_out_channels,
        layers_per_block=c.layers_per_block, down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels, norm_num_groups=c.norm_num_groups, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    vae.decoder.load_state_dict(weights(Decoder(c)))
    vae.encoder = None
    vae = vae.to(dtype).eval()
    if way == "diffusers tiled":
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // 8
    return lambda latent: vae.decode((latent / c.scaling_factor + c.shift_factor).unsqueeze(0).to(dtype)).sample[0]


def counted() -> list[dict[str, Any]]:
    """Bytes of tensors at their peak, weights not included."""
    rows = []
    for height, width in COUNTED:
        for dtype in DTYPES.values():
            decoder = Decoder(VaeConfig())
            empty = {name: torch.empty(shape, device="meta") for name, shape in shapes(decoder).items()}
            bound(decoder, empty, dtype)
            for name, way in WAYS.items():
                latent = torch.empty(16, height // 8, width // 8, device="meta")
                with torch.inference_mode(), LiveBytes() as live:
                    decode_as_planned(decoder, latent, way)
                predicted = predict_decode(VaeConfig(), height, width, dtype.itemsize, way, no_convolution).device_bytes
                rows.append(
                    {
                        "way": name, "size": f"{height}x{width}", "dtype": str(dtype).removeprefix("torch."),
                        "peak_bytes": live.peak_bytes, "predicted_bytes": predicted,
                    }
                )  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
