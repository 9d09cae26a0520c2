"""Draws one picture with a pipeline of diffusers, with its own models and with ours: the memory that the process takes.

    python benchmarks/diffusers_memory.py MODEL --out benchmarks/results/diffusers/NAME.json [--layers 6] [--ram 1.5GB]

MODEL is written if it is not there: random weights of the true widths in bfloat16, with a few layers. All compute in
float32 on the CPU. Each case is a process of its own; its peaks are the operating system's, of the call alone and of
the whole process, loading included. diffusers' group offload keeps on the disk what does not compute, block by block,
in a folder that is deleted. The last line is the JSON that also goes to --out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_size import machine

from zimage_lite.bench.machine import commit
from zimage_lite.config import TextEncoderConfig, TransformerConfig, VaeConfig
from zimage_lite.memory.meter import peak_rss_bytes

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from make_checkpoint import write_diffusers, write_tokenizer  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, default=6, help="of transformer and text encoder each")
    parser.add_argument("--ram", default="1.5GB", help="the ceiling of the last case")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--case", nargs=2, metavar=("NAME", "MADE"), help="one run; used by the others")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run(args.case[0], Path(args.case[1]), args)))
        return
    if not args.model.exists():
        make(args.model, args.layers)
    report = {"machine": machine(), "commit": commit(), "versions": versions()}
    report |= {"layers": args.layers, "size": args.size, "steps": args.steps, "ram": args.ram, "runs": cases(args)}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def versions() -> dict[str, str]:
    import diffusers

    return {"torch": torch.__version__, "diffusers": diffusers.__version__}


def make(folder: Path, layers: int) -> None:
    folder.mkdir(parents=True)
    encoder = replace(TextEncoderConfig(), num_hidden_layers=layers)
    configs = replace(TransformerConfig(), n_layers=layers), encoder, VaeConfig()
    write_diffusers(folder, configs, torch.bfloat16, seed=0)
    write_tokenizer(folder / "tokenizer", "full")


def cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The first is what the pictures of the others are compared with."""
    runs: list[dict[str, Any]] = []
    told = ["--size", str(args.size), "--steps", str(args.steps), "--ram", args.ram]
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(WAYS):
            made = Path(folder) / f"{number}.npy"
            command = [sys.executable, __file__, str(args.model), *told, "--case", name, str(made)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            picture, truth = np.load(made), np.load(Path(folder) / "0.npy")
            error = float(np.square(picture.astype(np.float64) - truth).mean())
            runs.append(
                {**json.loads(done.stdout.splitlines()[-1]), "psnr_db": -10 * np.log10(error) if error else None}
            )
            print(json.dumps(runs[-1]), file=sys.stderr)
    return runs


def run(name: str, made: Path, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=args.model.parent) as disk:
        start = time.perf_counter()
        pipe = WAYS[name](args, disk)
        pipe.set_progress_bar_config(disable=True)
        loaded, loading_peak = time.perf_counter(), peak_rss_bytes()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        picture = pipe(
            "a red circle", height=args.size, width=args.size, num_inference_steps=args.steps, guidance_scale=0.0,
            generator=torch.Generator().manual_seed(0), output_type="np",
        ).images[0]  # fmt: skip
        seconds, peak = time.perf_counter() - loaded, peak_rss_bytes()
    np.save(made, picture)
    return {
        "case": name,
        "peak_bytes_of_the_call": peak,
        "peak_bytes": max(peak, loading_peak),
        "seconds_to_load": round(loaded - start, 1),
        "seconds": round(seconds, 1),
    }


def theirs(args: argparse.Namespace, disk: str) -> Any:
    from diffusers import ZImagePipeline

    return ZImagePipeline.from_pretrained(args.model, torch_dtype=torch.float32)


def theirs_offloaded(args: argparse.Namespace, disk: str) -> Any:
    """As its documentation has it, but for a folder of each component: in one, as the pipeline's own method has it,
    files of transformer and text encoder have the same names (0.42.1)."""
    from diffusers.hooks import apply_group_offloading

    pipe, cpu = theirs(args, disk), torch.device("cpu")
    for name, kind in (("transformer", "block_level"), ("text_encoder", "block_level"), ("vae", "leaf_level")):
        folder = Path(disk) / name
        folder.mkdir()
        apply_group_offloading(
            getattr(pipe, name), onload_device=cpu, offload_device=cpu, offload_type=kind,
            num_blocks_per_group=1 if kind == "block_level" else None, offload_to_disk_path=str(folder),
        )  # fmt: skip
    return pipe


def ours(args: argparse.Namespace, disk: str) -> Any:
    from zimage_lite.diffusers import load_pipeline

    return load_pipeline(args.model, device="cpu", cache=False)


def ours_held(args: argparse.Namespace, disk: str) -> Any:
    from zimage_lite.diffusers import load_pipeline

    return load_pipeline(args.model, device="cpu", cache=False, ram=args.ram)


WAYS: dict[str, Callable[[argparse.Namespace, str], Any]] = {
    "diffusers": theirs,
    "diffusers, group offload to disk": theirs_offloaded,
    "ours": ours,
    "ours, within --ram": ours_held,
}

if __name__ == "__main__":
    main()
