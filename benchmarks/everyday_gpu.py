"""Whether what people do with pictures every day runs on a GPU as on the CPU, within the memory that was planned.

    python benchmarks/everyday_gpu.py --out benchmarks/results/NAME.json
    python benchmarks/everyday_gpu.py --device cpu      the same on the CPU alone, to see that this script works

It needs torch, numpy, numba, psutil, tokenizers, pillow and safetensors; where the package is not installed,
PYTHONPATH=.:kernels.

The built-in demo, in int4, draws at 64x64 with a LoRA, from a picture, with a mask, with a ControlNet, with all of them
and guidance, and twice as large; a small Omni sees a picture; a LoRA is trained; statistics are gathered. Each is done
on the CPU in float32, and on the GPU

exactly   in float32 by torch: no pixel is more than one level away, and few are; other numbers are off by rounding
fast      as it is chosen there by default, in 16 and 8 bits by the kernels: a picture has LEAST_DB at least
streamed  exactly, within room for a few blocks: as exactly, to the bit where nothing is added up in any order

In each, every phase must stay within its plan: what torch gave out, and the context as it is assumed.

Exits with 1 if something is not right, with 2 where there is no CUDA device. --out is written after each case; the last
line is the same JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_size import machine
from PIL import Image
from streaming_gpu import SMALL
from torch import Tensor

from zimage_lite.api import load, quantize
from zimage_lite.bench.machine import commit
from zimage_lite.calibration.statistics import Statistics
from zimage_lite.checkpoint.model_files import ModelFiles, open_model
from zimage_lite.config import GenerateOptions, Lora, OmniConfig, RuntimeOptions, TrainOptions, VisionConfig
from zimage_lite.convert.synthetic import open_synthetic
from zimage_lite.memory.placement import GRANULE_BYTES
from zimage_lite.memory.plan import CONTEXT, Plan
from zimage_lite.model.transformer import Transformer
from zimage_lite.pipeline import calibrating
from zimage_lite.pipeline.drawing import Pipeline
from zimage_lite.train.dataset import Example
from zimage_lite.train.lora import TrainedLora
from zimage_lite.train.lora_file import save_lora
from zimage_lite.train.trainer import Trainer
from zimage_lite.units import round_up

LEAST_DB = 35.0  # of a fast picture against the exact one
LOSSES, MOMENTS = 1e-3, 1e-3  # relative: two devices add up in different orders
ROOM_BLOCKS = 2  # streamed: so many of the largest blocks have room
EXACT = {"dtype": "fp32", "backend": "reference", "compute": "16bit"}
PROMPT = "a red circle on a blue background"
STEPS = 4
"""Of the demo, of which 8 are made for it."""


class Work:
    """device: that is compared with the CPU. A folder of what cases need, made once."""

    def __init__(self, device: str, folder: Path) -> None:
        self.device, self.folder = device, folder
        self.model, self.lora, self.picture = folder / "demo-int4", folder / "lora.safetensors", folder / "picture.png"
        quantize("demo", self.model, "int4", text_encoder_to="keep")
        draw_picture().save(self.picture)
        write_lora(self.lora, open_model(self.model))

    def pipeline(self, model: Path | ModelFiles, device: str, **options: Any) -> Pipeline:
        if isinstance(model, ModelFiles):
            return Pipeline(model, RuntimeOptions(device=device, cache=False, **options))
        return load(model, device=device, cache=False, **options)


def draw_picture() -> Image.Image:
    """A disk on a slope of colours."""
    y, x = np.mgrid[:64, :64]
    rgb = np.stack([4 * x, 255 - 4 * y, np.full_like(x, 128)], axis=-1)
    rgb[(x - 32) ** 2 + (y - 32) ** 2 < 300] = (250, 240, 30)
    return Image.fromarray(rgb.astype(np.uint8))


def write_lora(path: Path, files: ModelFiles, strength: float = 0.02) -> None:
    """On every linear of the layers, as `train-lora` writes it."""
    lora, random = TrainedLora(Transformer(files.transformer.config), 16, 0, torch.device("cpu")), torch.Generator()
    with torch.no_grad():
        for _, b in lora.pairs.values():
            b.normal_(0, strength, generator=random.manual_seed(1))
    save_lora(path, lora, TrainOptions(steps=1, rank=16), 1, 1)


def cases(work: Work) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """By their names."""
    request = GenerateOptions(PROMPT, 64, 64, steps=STEPS)
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255
    lora = {"loras": (Lora(str(work.lora)),)}
    picture: dict[str, Any] = {"image": str(work.picture), "strength": 0.7}
    inpainted = {**picture, "mask": Image.fromarray(mask), "strength": 1.0}
    control = {"controls": "demo", "control_image": str(work.picture), "control_from": ("canny",)}
    everything = {**lora, **inpainted, **control, "guidance": 1.0, "negative": "green"}
    for name, more in {
        "plain": {}, "LoRA": lora, "picture": picture, "mask": inpainted, "ControlNet": control,
        "all at once": everything, "enlarged": {"hires": 2.0},
    }.items():  # fmt: skip
        yield name, lambda more=more: drawn(work, work.model, [replace(request, **more), replace(request, seed=1)])
    sees = replace(request, width=128, height=128, steps=2, references=(str(work.picture),))
    yield "Omni", lambda: drawn(work, small_omni(), [sees])
    yield "streamed LoRA", lambda: streamed(work)
    yield "training", lambda: trained(work)
    yield "statistics", lambda: gathered(work)


def small_omni() -> ModelFiles:
    own = SMALL[0]
    tower = VisionConfig(hidden_size=96, num_hidden_layers=2, num_attention_heads=2, intermediate_size=160)
    config = OmniConfig(
        dim=own.dim, n_layers=3, n_refiner_layers=1, n_heads=own.n_heads, cap_feat_dim=own.cap_feat_dim,
        siglip_feat_dim=tower.hidden_size,
    )  # fmt: skip
    return open_synthetic("synthetic:omni/int8", configs=(config, *SMALL[1:]), vision=tower)


def drawn(work: Work, model: Path | ModelFiles, requests: Sequence[GenerateOptions]) -> dict[str, Any]:
    truth = work.pipeline(model, "cpu", **EXACT).generate(requests)
    found: dict[str, Any] = {}
    for way, options in {"exact": EXACT, "fast": {}}.items():
        with Watched(work.device) as watched:
            pipeline = work.pipeline(model, work.device, **options)
            images = pipeline.generate(requests)
        found[way] = compared(images, truth) | watched.memory(pipeline.plans, pipeline.meter.phases)
        found[way] |= pipeline.computes_with()
    is_exact = found["exact"]["levels"] <= 1 and found["exact"]["share_of_other_pixels"] < 0.05
    std = min(float(image.float().std()) for image in truth)
    return found | {
        "image_std": round(std, 1),
        "right": bool(is_exact and found["fast"]["psnr_db"] >= LEAST_DB and std > 10 and fits(found)),
    }


def streamed(work: Work) -> dict[str, Any]:
    """A LoRA on a model whose blocks come and go."""
    files = open_synthetic("synthetic:int8", configs=SMALL)
    lora = work.folder / "small.safetensors"
    write_lora(lora, files)
    request = GenerateOptions(PROMPT, 128, 128, steps=2, loras=(Lora(str(lora)),))
    found, images, first = dict[str, Any](), list[Tensor](), None
    for way in ("exact", "streamed"):
        options = EXACT if first is None else {**EXACT, **tight(first.plans, "denoise")}
        with Watched(work.device) as watched:
            pipeline = work.pipeline(files, work.device, **options)
            images += pipeline.generate([request])
        found[way] = {"blocks_streamed": len(pipeline.plans["denoise"].streamed)}
        found[way] |= watched.memory(pipeline.plans, pipeline.meter.phases)
        first = first or pipeline
    truth = work.pipeline(files, "cpu", **EXACT).generate([request])
    found["exact"] |= compared(images[:1], truth)
    found["streamed_is_exact"] = torch.equal(*images)
    right = found["streamed_is_exact"] and found["exact"]["levels"] <= 1 and fits(found)
    return found | {"right": bool(right and comes_and_goes(found, work))}


def trained(work: Work) -> dict[str, Any]:
    """Losses of a few steps, of a model in GGUF's types: in float32 its norms are used where they were copied to."""
    files = open_synthetic("synthetic:q4_k_m", configs=(replace(SMALL[0], n_layers=4), *SMALL[1:]))
    options = TrainOptions(steps=3, rank=8, rate=1e-3, batch=2, resolution=64)
    examples = [Example(work.picture, caption) for caption in ("a disk", "a yellow disk on colours")]
    losses, found, first = dict[str, list[float]](), dict[str, Any](), None
    for way, device in (("cpu", "cpu"), ("exact", work.device), ("streamed", work.device), ("fast", work.device)):
        more = {"cpu": EXACT, "exact": EXACT, "fast": {}}.get(way, EXACT)
        if way == "streamed" and first is not None:
            more = {**EXACT, **tight({"train": first.ways.plan}, "train")}
        with Watched(device) as watched:
            trainer = Trainer(work.pipeline(files, device, **more), examples, options)
            trainer.prepare()
            trainer.begin()
            losses[way] = list(trainer.steps(0, options.steps))
        plan = trainer.ways.plan
        found[way] = {"losses": losses[way], "dtype": trainer.hardware.dtype_name}
        found[way] |= {"blocks_streamed": len(plan.streamed)}
        found[way] |= watched.memory({"train": plan}, trainer.work.meter.phases) if way != "cpu" else {}
        first = trainer if way == "exact" else first
        trainer.release()
    off = {way: max(abs(a - b) / b for a, b in zip(losses[way], losses["cpu"], strict=True)) for way in losses}
    found["losses_off"] = off
    right = off["exact"] <= LOSSES and off["streamed"] <= LOSSES and off["fast"] <= 0.05 and fits(found)
    return found | {"right": bool(right and comes_and_goes(found, work))}


def gathered(work: Work) -> dict[str, Any]:
    """Second moments of what linears are given, of two pictures."""
    requests = [GenerateOptions(PROMPT, 64, 64, steps=2, seed=seed) for seed in range(2)]
    both: list[Statistics] = []
    found: dict[str, Any] = {}
    for device in ("cpu", work.device):
        with Watched(device) as watched:
            pipeline = work.pipeline(work.model, device, **EXACT)
            complete = [pipeline.complete(request) for request in requests]
            both.append(calibrating.begun(pipeline, None, {}))
            calibrating.gather(pipeline, complete, both[-1], lambda: None)
        if len(both) == 2:
            found["exact"] = watched.memory(pipeline.plans, pipeline.meter.phases)
    off = 0.0
    for name, truth in both[0].inputs.items():
        own = both[1].inputs[name]
        for a, b in ((own.squares, truth.squares), (own.products, truth.products)):
            if a is not None and b is not None:
                off = max(off, float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)))
    found["moments_off"] = off
    return found | {"right": off <= MOMENTS and fits(found)}


def compared(images: Sequence[Tensor], truth: Sequence[Tensor]) -> dict[str, Any]:
    apart = torch.cat([(a.int() - b.int()).abs().flatten() for a, b in zip(images, truth, strict=True)]).double()
    noise = float(apart.square().mean())
    return {
        "levels": int(apart.max()),
        "share_of_other_pixels": round(float((apart > 0).double().mean()), 5),
        "psnr_db": round(10 * math.log10(255**2 / noise), 1) if noise else 99.0,
    }


def tight(plans: Mapping[str, Plan], phase: str) -> dict[str, int]:
    """A ceiling that leaves room for a few blocks of the phase. plans: without one. On the CPU none: what the process
    keeps from one case to the next is more than these models."""
    plan = plans[phase]
    if plan.device == "cpu":
        return {}
    sizes = [round_up(n_bytes, GRANULE_BYTES) for n_bytes in plan.sizes.values()]
    needed = plan.peak_vram_bytes - sum(sizes) + ROOM_BLOCKS * max(sizes)
    return {"vram_bytes": max(needed, *(other.peak_vram_bytes for name, other in plans.items() if name != phase), 0)}


def comes_and_goes(found: Mapping[str, Any], work: Work) -> bool:
    """Whether blocks were streamed, where they can be made to."""
    return work.device == "cpu" or found["streamed"]["blocks_streamed"] > 0


def fits(found: Mapping[str, Any]) -> bool:
    """Whether every phase of every way stayed within its plan."""
    return all(way.get("within_plan", True) for way in found.values() if isinstance(way, Mapping))


class Watched:
    """What torch gives out of a GPU's memory meanwhile."""

    def __init__(self, device: str) -> None:
        self.cuda, self.before = device == "cuda", 0

    def __enter__(self) -> Watched:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def memory(self, plans: Mapping[str, Plan], phases: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """Of each phase on the GPU, megabytes planned and taken."""
        if not self.cuda:
            return {}
        rows = {
            phase: (plan.peak_vram_bytes - plan.fixed[CONTEXT], phases[phase]["peak_vram_bytes"] - self.before)
            for phase, plan in plans.items()
            if plan.device == "gpu"
        }
        told = {phase: [round(n_bytes / 1e6, 1) for n_bytes in row] for phase, row in rows.items()}
        return {"planned_taken_mb": told, "within_plan": all(taken <= planned for planned, taken in rows.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="only these")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device; --device cpu does without", file=sys.stderr)
        sys.exit(2)
    torch.backends.cudnn.allow_tf32 = False
    report: dict[str, Any] = {"machine": machine(), "commit": commit(), "device": args.device, "cases": []}
    with tempfile.TemporaryDirectory() as folder:
        for name, run in cases(Work(args.device, Path(folder))):
            if args.cases and name not in args.cases:
                continue
            start = time.perf_counter()
            try:
                case = run()
            except Exception as error:  # noqa: BLE001 - the others are run
                case = {"right": False, "failed": f"{type(error).__name__}: {error}"[-2000:]}
            case = {"name": name, "seconds": round(time.perf_counter() - start, 1), **case}
            report["cases"].append(case)
            print("right" if case["right"] else "WRONG", told(case), flush=True)
            if args.out:
                args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    sys.exit(not all(case["right"] for case in report["cases"]))


def told(case: Mapping[str, Any]) -> str:
    """In a line."""
    words = [f"{case['name']}: {case['seconds']:.1f} s"]
    for way, found in case.items():
        if isinstance(found, Mapping) and "levels" in found:
            words.append(f"{way} {found['levels']} levels, {found['psnr_db']} dB")
        if isinstance(found, Mapping) and not found.get("within_plan", True):
            words.append(f"{way} takes {found['planned_taken_mb']} (planned, taken)")
    words += [f"{key} {case[key]}" for key in ("losses_off", "moments_off", "failed") if key in case]
    return ", ".join(words)


if __name__ == "__main__":
    main()
