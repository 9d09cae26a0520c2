"""One table of all formats, in one setup: bits, size, error of the weights, and what becomes of the demo's pictures.

    pip install ".[bench]"
    python tools/make_checkpoint.py CHECKPOINT --size full --dtype bf16
    python benchmarks/format_table.py CHECKPOINT/transformer --out benchmarks/results/formats_cpu.json \\
        --plot docs/formats.svg

weights   relative RMSE and cosine per group of tensors: on the full-size synthetic transformer (the first 128 rows of
          every tensor, all of them where a format's scale spans the tensor), and on the demo's transformer.
pictures  200 held-out captions, drawn by the demo with its transformer and text encoder decoded from the format:
          PSNR and SSIM against the unquantized demo with the same seeds, and how often background, colour and shape
          are what the caption says.

The demo's rows are 384 and 1024 long, which K-quants cannot cut into blocks of 256. So that the table shows the format
and not its substitute, such a matrix is encoded as one long row; only this table does so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from full_size import machine
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from zimage_lite.bench.machine import commit

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from demo_scenes import held_out_captions
from evaluate_demo import evaluate, own_sampler

from zimage_lite import __version__
from zimage_lite.checkpoint.checkpoint import Checkpoint, open_checkpoint
from zimage_lite.checkpoint.model_card import DEMO, model_folder
from zimage_lite.checkpoint.stored import StoredTensor
from zimage_lite.compare.similarity import pixels, psnr_db, ssim
from zimage_lite.convert.catalog import all_targets
from zimage_lite.convert.fidelity import Sums, TensorError, report, sums
from zimage_lite.convert.recipe import KEEP, Target, target
from zimage_lite.quant.formats import EFFORTS, FORMATS, Format

SAMPLE_ROWS = 128
STEPS = 8
# Container -> its name and its marker in the plot.
_SERIES = {"gguf": ("GGUF", "o"), "comfy": ("ComfyUI", "s"), "bnb": ("bitsandbytes", "^"), "quanto": ("quanto", "D")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", help="the full-size transformer: a file, or a folder of shards")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="draw error against bits per weight")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--effort", default="reference")
    parser.add_argument("--redraw", action="store_true", help="only draw --plot from an existing --out")
    args = parser.parse_args()
    if not args.redraw:
        table = make_table(args.source, args.captions, args.effort)
        args.out.write_text(json.dumps(table, indent=1) + "\n")
    if args.plot:
        plot(json.loads(args.out.read_text()), args.plot)


def make_table(source: Path, captions: int, effort: str) -> dict[str, Any]:
    checkpoint, demo = open_checkpoint(source), model_folder(DEMO)
    torch.set_num_threads(1)
    full, rows = {each: Weights(checkpoint, each, SAMPLE_ROWS) for each in EFFORTS}, []
    pictures = Pictures(demo, captions)
    for chosen, cost in all_targets():
        row: dict[str, Any] = {
            "format": chosen.name,
            "container": chosen.container,
            "bits_per_weight": round(cost.bits_per_weight, 3),
            "transformer_bytes": cost.bytes,
            "full_size": report(full[effort].errors(chosen)),
            "relative_rmse_by_effort": by_effort(full, chosen),
        }
        with TemporaryDirectory() as folder:
            row["demo"] = report(decode_model(demo, Path(folder) / "model", chosen, effort))
            row["pictures"] = pictures.compare(Path(folder) / "model")
        rows.append(row)
        print(json.dumps({key: row[key] for key in ("format", "bits_per_weight", "pictures")}), flush=True)
    setup = {"sampled_rows": SAMPLE_ROWS, "captions": captions, "effort": effort, "steps": STEPS}
    return {"machine": machine(), "version": __version__, "commit": commit(), **setup, "rows": rows}


def by_effort(full: dict[str, Weights], chosen: Target) -> dict[str, float]:
    """Relative RMSE of what the recipe really shrinks: tensors that stay 16-bit would dilute it."""
    errors = {effort: [e for e in weights.errors(chosen) if e.sums.error] for effort, weights in full.items()}
    return {effort: report(found)["all"]["relative_rmse"] if found else 0.0 for effort, found in errors.items()}


class Weights:
    """Errors of a checkpoint's tensors. What two recipes have in common is measured once."""

    def __init__(self, checkpoint: Checkpoint, effort: str, sample_rows: int | None) -> None:
        self.checkpoint, self.effort, self.sample_rows = checkpoint, effort, sample_rows
        self._known: dict[tuple[str, str], Sums] = {}

    def errors(self, chosen: Target) -> list[TensorError]:
        jobs = [(tensor, wanted(self.checkpoint, tensor, chosen)) for tensor in self.checkpoint.tensors.values()]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(lambda job: self._sums(*job), jobs))
        return [
            TensorError(tensor.name, tensor.name, row.name, int(row.bits_per_weight() / 8 * total.count), total)
            for (tensor, row), total in zip(jobs, found, strict=True)
        ]

    def _sums(self, tensor: StoredTensor, row: Format) -> Sums:
        key = tensor.name, row.name
        if key not in self._known:
            few = self.sample_rows is not None and not row.per_tensor and tensor.rows > self.sample_rows
            x = tensor.read_float(0, self.sample_rows if few else tensor.rows)
            self._known[key] = scaled(sums(x, decoded(x, row, self.effort)), tensor.rows / len(x))
        return self._known[key]


def scaled(found: Sums, factor: float) -> Sums:
    """What some rows say of the whole tensor."""
    totals = (found.xx * factor, found.yy * factor, found.xy * factor, found.error * factor)
    return Sums(round(found.count * factor), *totals, found.largest)


def wanted(checkpoint: Checkpoint, tensor: StoredTensor, chosen: Target) -> Format:
    recipe = chosen.recipe(checkpoint.component)
    config = checkpoint.config
    n_layers = config.n_layers if checkpoint.component == "transformer" else config.num_hidden_layers
    return recipe.wanted((tensor.name,), tensor.shape, tensor.format, n_layers)


def decoded(x: Tensor, row: Format, effort: str) -> Tensor:
    """x: [rows, columns] float32, encoded and decoded again."""
    view = x if row.fits(x.shape[1]) else x.reshape(1, -1)
    if not row.fits(view.shape[1]):
        return x  # a handful of weights
    options = row.codec.options(view.shape[1])
    parts = row.codec.quantize(view.contiguous(), options, effort)
    return row.codec.dequantize(parts, view.shape[1], options)[: view.shape[0]].reshape(x.shape)


def decode_model(source: Path, out: Path, chosen: Target, effort: str) -> list[TensorError]:
    """A copy of the model with float32 weights that went through the format; the errors of its transformer."""
    encoder = target(chosen.text_encoder_to) if chosen.text_encoder_to != KEEP else None
    out.mkdir()
    for entry in source.iterdir():
        if entry.name not in ("transformer", "text_encoder"):
            (out / entry.name).symlink_to(entry.resolve())
    errors = []
    for component, to in (("transformer", chosen), ("text_encoder", encoder)):
        checkpoint, tensors = open_checkpoint(source / component), {}
        for name, tensor in checkpoint.tensors.items():
            x = tensor.read_float()
            row = FORMATS["f32"] if to is None else wanted(checkpoint, tensor, to)
            y = decoded(x, row, effort)
            tensors[name] = y.reshape(tensor.shape).contiguous()
            if component == "transformer":
                n_bytes = int(row.bits_per_weight() / 8 * x.numel())
                errors.append(TensorError(name, name, row.name, n_bytes, sums(x, y)))
        (out / component).mkdir()
        (out / component / "config.json").write_bytes((source / component / "config.json").read_bytes())
        save_file(tensors, out / component / "model.safetensors")
    return errors


class Pictures:
    """What the unquantized demo draws, to compare others with."""

    def __init__(self, demo: Path, captions: int) -> None:
        self.captions = held_out_captions("one", captions)
        self.true = self._draw(demo)[1]

    def compare(self, model: Path) -> dict[str, float]:
        shares, drawn = self._draw(model)
        named = {f"right_{part}": shares[part] for part in ("all", "background", "colours", "shapes")}
        pairs = [(pixels(a), pixels(b)) for a, b in zip(self.true, drawn, strict=True)]
        psnr, similarity = mean(psnr_db(a, b) for a, b in pairs), mean(ssim(a, b) for a, b in pairs)
        return {"psnr_db": round(psnr, 2), "ssim": round(similarity, 4), **named}

    def _draw(self, model: Path) -> tuple[dict[str, float], list[Image.Image]]:
        torch.set_num_threads(os.cpu_count() or 1)
        shares, drawn = evaluate(own_sampler(model, STEPS), self.captions)
        torch.set_num_threads(1)
        return shares, [picture for _, picture, _ in drawn]


def plot(table: dict[str, Any], path: Path) -> None:
    """Relative RMSE of the full-size transformer against bits per weight, both over all its weights."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "zimage-lite"  # the same picture has the same bytes
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    points = [
        (row["bits_per_weight"], row["full_size"]["all"]["relative_rmse"], row["format"], row["container"])
        for row in table["rows"]
        if row["full_size"]["all"]["relative_rmse"] > 1e-4
    ]
    for container, (label, marker) in _SERIES.items():
        own = [point for point in points if point[3] == container]
        axes.plot([x for x, *_ in own], [y for _, y, *_ in own], marker, label=label)
    for number, (x, y, names) in enumerate(labels(points)):
        above = number % 2 == 0
        place = {"xytext": (0, 7 if above else -7), "ha": "center", "va": "bottom" if above else "top"}
        axes.annotate(names, (x, y), textcoords="offset points", fontsize=8, **place)
    axes.margins(x=0.08, y=0.08)
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight, whole transformer")
    axes.set_ylabel("relative RMSE of the weights")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def labels(points: list[tuple[float, float, str, str]]) -> list[tuple[float, float, str]]:
    """One label for points that lie on each other, from left to right."""
    found: list[tuple[float, float, str]] = []
    for x, y, name, _ in sorted(points):
        near = next((i for i, (u, v, _) in enumerate(found) if abs(u - x) < 0.05 and abs(v / y - 1) < 0.1), None)
        if near is None:
            found.append((x, y, name))
        else:
            found[near] = (*found[near][:2], f"{found[near][2]}, {name}")
    return found


if __name__ == "__main__":
    main()
