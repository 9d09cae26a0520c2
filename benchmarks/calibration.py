"""What calibration gains on the demo, format by format: blind against calibrated, at equal size.

    python benchmarks/calibration.py --out benchmarks/results/calibration/demo_cpu.json

Each row is written as it is done.

Statistics come from captions of the demo's training grammar; pictures are of captions that neither training nor the
statistics have seen, drawn with the transformer's weights decoded from each format (the text encoder stays as it is),
against those of the unquantized demo with the same seeds: PSNR, SSIM, and how often the caption is shown right.

    blind       --effort reference: ggml's own bytes
    best        --effort best, blind (only if it is asked for)
    weighted    --effort reference --calibration: ggml's own bytes with an importance matrix
    calibrated  --effort best --calibration: errors made up for in the columns that follow
    ..., rank 4 with --repair --repair-rank 4 beside it, of which repair_bytes are said; 4 of the demo's 384 columns are
                what 40 are of the true model's

output error: of what the quantized layers' linears give, relative, on inputs of the held-out captions.

The demo's rows are 384 and 1024 long, which K-quants cannot cut into blocks of 256. Here they are filled up with zeros,
in all columns alike, so that the table shows the format and not its substitute.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch.nn.functional as F
from full_size import machine
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from zimage_lite import GenerateOptions, __version__, load
from zimage_lite.bench.machine import commit
from zimage_lite.calibration.statistics import Statistics, input_of
from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.checkpoint.model_card import DEMO, model_folder
from zimage_lite.compare.similarity import pixels, psnr_db, ssim
from zimage_lite.convert.allocation import CANDIDATES, Choice, allocate
from zimage_lite.convert.recipe import target
from zimage_lite.pipeline import calibrating
from zimage_lite.pipeline.denoise import BLOCKS
from zimage_lite.quant.formats import FORMATS, Format
from zimage_lite.quant.inputs import Inputs
from zimage_lite.quant.low_rank import low_rank

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from demo_judge import judge
from demo_scenes import LANGUAGES, caption, held_out_captions, random_scene

AUTO = {"auto:4.5bpw": ("", 4.5), "auto, 2/3 of q4_k_m": ("q4_k_m", 2 / 3)}  # bits, or a share of that recipe's
RECIPES = (
    "q4_k_m", "q3_k_s", "q2_k", "q4_k_s", *AUTO, "q4_0", "iq4_xs", "q3_k_m", "iq4_nl", "q4_1", "q5_k_s", "q5_0", "q5_1",
    "int4", "nf4", "int8",
)  # fmt: skip
WAYS = {  # --effort, whether with --calibration, and --repair-rank
    "blind": ("reference", False, 0),
    "best": ("best", False, 0),
    "weighted": ("reference", True, 0),
    "calibrated": ("best", True, 0),
    "blind, rank 4": ("reference", False, 4),
    "blind, rank 32": ("reference", False, 32),
    "calibrated, rank 4": ("best", True, 4),
    "calibrated, rank 32": ("best", True, 32),
}
REPAIRED = ("int4", "nf4", "q2_k")  # recipes that are measured with repairs as well
STEPS = 8
SEEDS = {"seen": 10_000, "held out": 1000}  # of the first caption; the others count up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--captions", type=int, default=200, help="that are drawn")
    parser.add_argument("--seen", type=int, default=192, help="that the statistics are of")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--ways", nargs="+", default=[way for way in WAYS if way != "best"], choices=tuple(WAYS))
    args = parser.parse_args()
    bench = Bench(args.captions, args.seen)
    setup = {"captions": args.captions, "seen": args.seen, "steps": STEPS}
    result: dict[str, Any] = {"machine": machine(), "version": __version__, "commit": commit(), **setup, "rows": []}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for recipe in args.recipes:
        formats = bench.formats_of(recipe)
        row: dict[str, Any] = {"recipe": recipe, "bits_per_weight": bench.size(formats)}
        row |= {way: bench.measured(formats, way) for way in args.ways if suits(recipe, way)}
        if recipe in AUTO:
            row["formats"] = Counter(format.name for format in formats.values())
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def suits(recipe: str, way: str) -> bool:
    if recipe in AUTO:
        return way == "calibrated"
    return recipe in REPAIRED or not WAYS[way][2]


class Bench:
    """The demo as it is: its pictures, and the statistics of its inputs, for the quantizers and for the measuring."""

    def __init__(self, captions: int, seen: int) -> None:
        self.demo = model_folder(DEMO)
        self.source = open_checkpoint(self.demo / "transformer")
        self.captions = held_out_captions("one", captions)
        rng = np.random.default_rng(5)
        scenes = [random_scene(rng, "one") for _ in range(seen)]
        told = [caption(scene, rng, LANGUAGES[i % 2]) for i, scene in enumerate(scenes)]
        self.known = inputs_of(gathered(self.demo, requests(told, "seen")))
        self.unseen = inputs_of(gathered(self.demo, requests([text for text, _ in self.captions], "held out")))
        self.true, self.right = self._drawn(self.demo)

    def formats_of(self, recipe: str) -> dict[str, Format]:
        """What each tensor gets, whether or not it fits its rows."""
        if recipe in AUTO:
            base, bits = AUTO[recipe]
            return self._allocated(bits * (self.size(self.formats_of(base)) if base else 1))
        chosen, n_layers = target(recipe).recipe("transformer"), self.source.config.n_layers
        tensors = self.source.tensors.items()
        return {name: chosen.wanted((name,), tensor.shape, tensor.format, n_layers) for name, tensor in tensors}

    def size(self, formats: Mapping[str, Format]) -> float:
        """Bits for each weight of the transformer, without those that its rows are filled up with."""
        total = sum(self._bytes(row, name) for name, row in formats.items())
        return round(8 * total / sum(map(self._count, formats)), 3)

    def _allocated(self, bits: float) -> dict[str, Format]:
        """As `quantize --to auto` does it."""
        base, weights = self.formats_of("q4_k_m"), sum(map(self._count, self.source.tensors))
        kept = sum(self._bytes(row, name) for name, row in base.items() if name not in self._choices)
        return base | {
            name: FORMATS[choice.format]
            for name, choice in allocate(self._choices, int(bits * weights / 8 - kept)).items()
        }

    @cached_property
    def _choices(self) -> dict[str, list[Choice]]:
        """Of each matrix of a block, measured on every fourth row."""
        found = {}
        for name, tensor in sorted(self.source.tensors.items()):
            if name.split(".")[0] in BLOCKS and len(tensor.shape) == 2:
                x, known = tensor.read_float()[::4].contiguous(), self.known[input_of(name)]
                rows = [FORMATS[each] for each in CANDIDATES]
                found[name] = [Choice(row.name, int(self._bytes(row, name)), wrong(x, row, known)) for row in rows]
        return found

    def _bytes(self, row: Format, name: str) -> float:
        return row.bits_per_weight() * self._count(name) / 8

    def _count(self, name: str) -> int:
        return math.prod(self.source.tensors[name].shape)

    def measured(self, formats: Mapping[str, Format], way: str) -> dict[str, float]:
        """Of the transformer in these formats."""
        effort, calibrated, rank = WAYS[way]
        tensors, errors, repair_bytes = {}, [], 0
        for name, tensor in self.source.tensors.items():
            x, row, own = tensor.read_float(), formats[name], self.known.get(input_of(name))
            y = decoded(x, row, effort, own if calibrated else None)
            if rank and own is not None and row.lossy and len(tensor.shape) == 2:
                update = low_rank(x - y, own, rank)
                y = y + update.up.bfloat16().float() @ update.down.bfloat16().float()
                repair_bytes += 2 * (update.up.numel() + update.down.numel())
            tensors[name] = y.reshape(tensor.shape).contiguous()
            if row.bits_per_weight() < 9 and input_of(name) in self.unseen:
                found = self.unseen[input_of(name)]
                errors.append(float((found.error(x - y).sum() / found.error(x).sum()).sqrt()))
        with TemporaryDirectory() as folder:
            found = {"output_error": round(mean(errors), 5), **self._compared(save(self.demo, tensors, Path(folder)))}
        return found | ({"repair_bytes": repair_bytes} if rank else {})

    def _compared(self, model: Path) -> dict[str, float]:
        drawn, right = self._drawn(model)
        pairs = [(pixels(a), pixels(b)) for a, b in zip(self.true, drawn, strict=True)]
        psnr, similarity = mean(psnr_db(a, b) for a, b in pairs), mean(ssim(a, b) for a, b in pairs)
        return {"psnr_db": round(psnr, 2), "ssim": round(similarity, 4), "right": round(100 * right, 1)}

    def _drawn(self, model: Path) -> tuple[list[Image.Image], float]:
        pipeline = load(model, device="cpu", compute="16bit")
        drawn = pipeline.generate(requests([text for text, _ in self.captions], "held out"))
        pictures = [Image.fromarray(pixels.numpy()) for pixels in drawn]
        scenes = [scene for _, scene in self.captions]
        return pictures, mean(judge(picture, scene).all for picture, scene in zip(pictures, scenes, strict=True))


def requests(captions: list[str], which: str) -> list[GenerateOptions]:
    return [GenerateOptions(text, 64, 64, STEPS, seed=SEEDS[which] + i) for i, text in enumerate(captions)]


def gathered(model: Path, wanted: list[GenerateOptions]) -> Statistics:
    pipeline = load(model, device="cpu", compute="16bit")
    found = calibrating.begun(pipeline, None, {})
    calibrating.gather(pipeline, wanted, found, lambda: None)
    return found


def inputs_of(statistics: Statistics) -> Mapping[str, Inputs]:
    found = {}
    for name, own in statistics.inputs.items():
        products = own.products / float(own.counts.sum()) if own.products is not None else None
        found[name] = Inputs(own.mean_squares, products)
    return found


def wrong(x: Tensor, row: Format, known: Inputs) -> float:
    """The share of the output's mean square."""
    return float(known.error(decoded(x, row, "best", known) - x).sum() / known.error(x).sum())


def decoded(x: Tensor, row: Format, effort: str, known: Inputs | None) -> Tensor:
    """x: [rows, columns] float32, encoded and decoded again."""
    more = math.ceil(x.shape[1] / row.block) * row.block - x.shape[1]
    if more:
        x, known = F.pad(x, (0, more)), known and padded(known, more)
    options = row.codec.options(x.shape[1])
    parts = row.codec.quantize(x, options, effort, known)
    return row.codec.dequantize(parts, x.shape[1], options)[: len(x), : x.shape[1] - more]


def padded(known: Inputs, more: int) -> Inputs:
    """Of columns that are always zero."""
    hessian = None if known.hessian is None else F.pad(known.hessian, (0, more, 0, more))
    return Inputs(F.pad(known.squares, (0, more)), hessian)


def save(demo: Path, tensors: Mapping[str, Tensor], folder: Path) -> Path:
    """A copy of the model with such a transformer."""
    out = folder / "model"
    out.mkdir()
    for entry in demo.iterdir():
        if entry.name != "transformer":
            (out / entry.name).symlink_to(entry.resolve())
    (out / "transformer").mkdir()
    (out / "transformer" / "config.json").write_bytes((demo / "transformer" / "config.json").read_bytes())
    save_file(dict(tensors), out / "transformer" / "model.safetensors")
    return out


if __name__ == "__main__":
    main()
