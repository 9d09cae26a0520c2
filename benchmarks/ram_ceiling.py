"""Whether --ram holds on the CPU beside two busy programs: peaks of whole runs, most of them bound by the VAE.

    python benchmarks/ram_ceiling.py [--runs 20] [--out benchmarks/results/NAME.json]

A tiny model with its own small VAE and with the true one's widths, random weights, three sizes each, one step. Peaks
are what the process says of itself, as the system counts (VmHWM). Exits 1 if one exceeds its ceiling.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from full_size import machine
from make_checkpoint import make_checkpoint

from zimage_lite.bench.machine import commit
from zimage_lite.units import parse_bytes

# VAE, width, height, ceiling. The result says what was decoded whole and what in bands.
CASES = (
    ("tiny", 1280, 720, "700MB"), ("tiny", 1280, 720, "1GB"), ("tiny", 512, 512, "450MB"),
    ("true", 768, 432, "1100MB"), ("true", 512, 512, "1GB"), ("true", 256, 256, "1GB"),
)  # fmt: skip
BUSY = "while True: sum(range(10**6))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, busy(2):
        work = Path(folder)
        make_checkpoint(work / "model", "tiny", layout="comfyui")
        write_true_vae(work / "vae")
        runs: dict[tuple[str, int, int, str], list[dict[str, Any]]] = {case: [] for case in CASES}
        for done in range(1, args.runs + 1):  # in turns, kept after each
            for case, found in runs.items():
                found.append(run(work, *case))
            rows = [row(case, found) for case, found in runs.items()]
            report = {"machine": machine(), "commit": commit(), "runs": done, "rows": rows}
            if args.out:
                args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    sys.exit(0 if all(row["kept"] for row in rows) else 1)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Other programs that want the processor."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def write_true_vae(folder: Path) -> None:
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, scaling_factor=0.3611,
        shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    vae.to(torch.bfloat16).save_pretrained(folder)


def run(work: Path, vae: str, width: int, height: int, ram: str) -> dict[str, Any]:
    options = ["--width", width, "--height", height, "--ram", ram, "--steps", 1, "-o", work / "x.png", "--no-cache"]
    options += ["--vae", work / "vae"] if vae == "true" else []
    command = [sys.executable, "-m", "zimage_lite", "generate", "x", "--model", work / "model", "--json", *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    rows = said["phases"]["decode"]["planned"]["way"]["rows_per_band"]
    return {"peak": said["peak_rss_bytes"], "planned": said["planned_rss_bytes"], "rows_per_band": rows}


def row(case: tuple[str, int, int, str], found: list[dict[str, Any]]) -> dict[str, Any]:
    vae, width, height, ram = case
    ceiling, peaks = parse_bytes(ram), [one["peak"] for one in found]
    ratios = [one["peak"] / one["planned"] for one in found]
    print(
        f"{vae} VAE, {width}x{height}, --ram {ram}: peaks {min(peaks) / 1e6:.0f} to {max(peaks) / 1e6:.0f} MB, "
        f"{min(ratios):.2f} to {max(ratios):.2f} of what was planned",
        flush=True,
    )
    size = f"{width}x{height}"
    return {"vae": vae, "size": size, "ram": ram, "runs": found, "kept": max(peaks) <= ceiling}


if __name__ == "__main__":
    main()
