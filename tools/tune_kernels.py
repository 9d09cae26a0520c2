"""Choose the tiles of an architecture and write them to `zimage_kernels/tuning/sm_<arch>.json`.

    python tools/tune_kernels.py [--op linear_int8] [--write]          on the GPU whose architecture is tuned
    python tools/tune_kernels.py --arch 86 --op linear_int8            anywhere: what could run there

Every candidate is compiled first, as tools/compile_kernels.py does, and what would spill or take more shared memory
than a block can have is out. Where a GPU of that architecture is there, the others are timed on Z-Image's shapes, and
the fastest of each bucket is kept. Buckets stay as the file has them. Without --write nothing changes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from compile_kernels import Row, compile_variant
from zimage_kernels import attention_int8, flash_attention, linear_int8, swiglu_int8, tuning
from zimage_kernels._triton import capability

FOLDER = Path(tuning.__file__).parent / "tuning"
MOST_ROWS = 4224  # of the last bucket, which has no bound: 1024x1024 and its caption
DIM, HIDDEN, HEADS, HEAD_DIM = 3840, 10240, 30, 128

Tile = dict[str, int]
# The module that holds an op's variants, and the sizes to try.
OPS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "linear_int8": ("linear_int8", {"BLOCK_N": (32, 64, 128, 256), "BLOCK_K": (32, 64, 128), "DOTS": (1, 2)}),
    "swiglu_int8": ("swiglu_int8", {"BLOCK_N": (32, 64, 128), "BLOCK_K": (32, 64, 128)}),
    "attention": ("attention", {"BLOCK_N": (32, 64, 128)}),
    "attention_int8": ("attention", {"BLOCK_N": (32, 64, 128)}),
}
SCHEDULES = {"num_warps": (4, 8), "num_stages": (2, 3, 4, 5)}


def candidates(op: str, up_to: int | None) -> Iterator[Tile]:
    """Tiles for a bucket: no higher than it, or up to 256 rows."""
    heights = [m for m in (16, 32, 64, 128, 256) if up_to is None or m <= up_to]
    sizes: dict[str, Iterable[int]] = {"BLOCK_M": heights[-3:], **OPS[op][1]}
    if op.endswith("_int8") and op != "attention_int8":
        sizes["GROUP_M"] = (8,)
    for values in product(*sizes.values(), *SCHEDULES.values()):
        yield dict(zip((*sizes, *SCHEDULES), values, strict=True))


def only(op: str, tile: Tile) -> None:
    """Make every launch and every list of variants take this tile."""
    table = {name: [{"up_to": None, **tile}] if name == op else [] for name in OPS}
    tuning.load = lambda arch: table  # type: ignore[assignment]
    tuning.choose.cache_clear()


def compiled(op: str, arch: int, tile: Tile) -> list[Row]:
    """All that the op compiles at that tile; an empty fault says that it may ship."""
    only(op, tile)
    listed = importlib.import_module(f"zimage_kernels.{OPS[op][0]}").variants(arch)
    return [compile_variant(variant, arch) for variant in listed]


def call(op: str, rows: int) -> Callable[[], Any]:
    """The op on Z-Image's shapes, on the GPU."""

    def codes(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.randint(-127, 128, (height, width), dtype=torch.int8, device="cuda")
        return values, torch.rand(height, device="cuda") / 1000

    if op == "linear_int8":
        x, w = codes(rows, DIM), codes(3 * DIM, DIM)
        return lambda: linear_int8(*x, *w, backend="triton")
    if op == "swiglu_int8":
        x, w1, w3 = codes(rows, DIM), codes(HIDDEN, DIM), codes(HIDDEN, DIM)
        return lambda: swiglu_int8(*x, *w1, *w3, backend="triton")
    dtype = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    q, k, v = (torch.randn(rows, HEADS, HEAD_DIM, device="cuda", dtype=dtype) for _ in range(3))
    if op == "attention":
        return lambda: flash_attention(q, k, v, [rows], backend="triton")
    scale = torch.rand(HEADS, rows, device="cuda").T / 1000
    q8, k8 = (torch.randint(-127, 128, q.shape, dtype=torch.int8, device="cuda") for _ in range(2))
    return lambda: attention_int8(q8, scale, k8, scale, v, [rows], backend="triton")


def tuned(op: str, arch: int, up_to: int | None, timed: bool) -> Tile | None:
    """The fastest tile of a bucket; None where nothing can be timed. Prints what may ship."""
    from triton.testing import do_bench

    found: list[tuple[float, Tile]] = []
    run = call(op, up_to or MOST_ROWS) if timed else None
    for tile in candidates(op, up_to):
        rows = compiled(op, arch, tile)
        if any(row.fault for row in rows):
            continue
        ms = do_bench(run, quantiles=[0.5]) if run else float("nan")
        found.append((ms, tile))
        registers, shared = max(row.registers for row in rows), max(row.shared_bytes for row in rows)
        occupancy = min(row.occupancy for row in rows)
        sizes = " ".join(f"{name} {value}" for name, value in tile.items())
        time = f"{ms:.3f} ms" if run else "not timed"
        print(f"{op} up to {up_to}: {sizes}: {registers} registers, {shared >> 10} KiB, {occupancy:.0%}, {time}")
    return min(found, key=lambda pair: pair[0])[1] if run and found else None


def written(table: dict[str, list[dict[str, Any]]]) -> str:
    """As the files are: a bucket on a line."""
    ops = []
    for op, buckets in table.items():
        lines = ",\n".join(f"    {json.dumps(bucket)}" for bucket in buckets)
        ops.append(f'  "{op}": [\n{lines}\n  ]')
    return "{\n" + ",\n".join(ops) + "\n}\n" if ops else "{}\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, choices=tuning.ARCHITECTURES, help="default: that of this GPU")
    parser.add_argument("--op", action="append", choices=OPS, help="default: all")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(arguments)
    here = tuning.nearest(capability(torch.device("cuda"))) if torch.cuda.is_available() else None
    arch = options.arch or here
    if arch is None:
        parser.error("no CUDA GPU is here: name an --arch, to see what could run there")
    if options.write and arch != here:
        parser.error(f"--write: got --arch {arch}, expected that of this GPU ({here or 'there is none'})")
    file = FOLDER / f"sm_{arch}.json"
    table = json.loads(file.read_text(encoding="utf-8"))
    for op in options.op or [name for name in OPS if name in table]:
        for bucket in table.get(op, []):
            best = tuned(op, arch, bucket["up_to"], timed=arch == here)
            if best:
                bucket |= best
    if options.write:
        file.write_text(written(table), encoding="utf-8")
        print(f"{file}: run tools/compile_kernels.py --arch {arch} and the tests of the kernels before you commit it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
