"""Choose the tiles of an architecture and write them to `zimage_kernels/tuning/sm_<arch>.json`.

    python tools/tune_kernels.py [--op linear_int8] [--write]          on the GPU whose architecture is tuned
    python tools/tune_kernels.py --arch 86 --op linear_int8            anywhere: what could run there

Tried are those of tiles_to_try.py for long inputs, three minutes of compilations and times; with --all every tile that
there could be, for every bucket, which takes hours. Each is compiled first, as tools/compile_kernels.py does, and what
would spill or take more shared memory than a block can have is out. Where a GPU of that architecture is there, the
others are timed on Z-Image's shapes, today's before any other, and the fastest is kept whose other variants may ship,
too. Ops have equal shares of --seconds, and what is found is written after each of them: running out of time loses
nothing. Buckets stay as the file has them. Without --write nothing changes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from compile_kernels import Row, compile_variant
from tiles_to_try import OPS, short_list
from zimage_kernels import adds_faster_in_float16, attention_int8, flash_attention, linear_int8, swiglu_int8, tuning
from zimage_kernels._triton import HALF_RATE_SUMS, capability
from zimage_kernels.aot import Variant

FOLDER = Path(tuning.__file__).parent / "tuning"
MOST_ROWS = 4224  # of the last bucket, which has no bound: 1024x1024 and its caption
DIM, HIDDEN, HEADS, HEAD_DIM = 3840, 10240, 30, 128
SECONDS = 180
LEAST_GAIN = 0.02  # of the time, below which today's tile stays
SCHEDULES = {"num_warps": (4, 8), "num_stages": (2, 3, 4, 5)}

Tile = dict[str, int]


def every_tile(op: str, up_to: int | None) -> Iterator[Tile]:
    """Tiles for a bucket: no higher than it, or up to 256 rows."""
    heights = [m for m in (16, 32, 64, 128, 256) if up_to is None or m <= up_to]
    sizes: dict[str, Iterable[int]] = {"BLOCK_M": heights[-3:], "BLOCK_N": (32, 64, 128, 256)}
    if op in ("linear_int8", "swiglu_int8"):
        sizes |= {"BLOCK_K": (32, 64, 128), "GROUP_M": (8,)}
    if op == "linear_int8":
        sizes["DOTS"] = (1, 2)
    for values in product(*sizes.values(), *SCHEDULES.values()):
        yield dict(zip((*sizes, *SCHEDULES), values, strict=True))


def only(op: str, tile: Tile) -> None:
    """Make every launch and every list of variants take this tile."""
    table = {name: [{"up_to": None, **tile}] if name == op else [] for name in OPS}
    tuning.load = lambda arch: table  # type: ignore[assignment]
    tuning.choose.cache_clear()


def listed(op: str, arch: int, tile: Tile) -> list[Variant]:
    """All that the op compiles at that tile, first what a picture uses."""
    only(op, tile)
    variants = importlib.import_module(f"zimage_kernels.{OPS[op]}").variants(arch)
    halves = op == "attention_int8" and arch in HALF_RATE_SUMS
    usual = " fp16 sums" if halves else " bf16 "  # of products, the plain one is the first already
    return sorted(variants, key=lambda variant: usual not in variant.name)


def compiled(op: str, arch: int, tile: Tile) -> list[Row]:
    """An empty fault says that a variant may ship."""
    return [compile_variant(variant, arch) for variant in listed(op, arch, tile)]


def call(op: str, rows: int) -> Callable[[], torch.Tensor]:
    """The op on Z-Image's shapes, on the GPU."""

    def codes(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.randint(-127, 128, (height, width), dtype=torch.int8, device="cuda")
        return values, torch.rand(height, device="cuda") / 1000

    if op == "linear_int8":
        x, w = codes(rows, DIM), codes(DIM, DIM)
        return lambda: linear_int8(*x, *w, backend="triton")
    if op == "swiglu_int8":
        x, w1, w3 = codes(rows, DIM), codes(HIDDEN, DIM), codes(HIDDEN, DIM)
        return lambda: swiglu_int8(*x, *w1, *w3, backend="triton")
    sums = op == "attention_int8" and adds_faster_in_float16(torch.device("cuda"))
    dtype = torch.float16 if sums or torch.cuda.get_device_capability() < (8, 0) else torch.bfloat16
    q, k, v = (torch.randn(rows, HEADS, HEAD_DIM, device="cuda", dtype=dtype) for _ in range(3))
    if op == "attention":
        return lambda: flash_attention(q, k, v, [rows], backend="triton")
    scale = torch.rand(HEADS, rows, device="cuda").T / 1000
    q8, k8 = (torch.randint(-127, 128, q.shape, dtype=torch.int8, device="cuda") for _ in range(2))
    return lambda: attention_int8(q8, scale, k8, scale, v, [rows], sums, backend="triton")


def timed(run: Callable[[], torch.Tensor], truth: torch.Tensor | None) -> tuple[float, str]:
    """Milliseconds, infinite for what must not be taken, and why. truth: what another tile gave."""
    from triton.testing import do_bench

    try:
        got = run()
        if truth is not None and not same(got, truth):
            return math.inf, "another result than today's"
        ms = do_bench(run, quantiles=[0.5])
    except Exception as error:  # noqa: BLE001 - a tile may fail in any way, and the others are still to come
        return math.inf, f"{type(error).__name__}: {error}".splitlines()[0]
    return ms, f"{ms:.3f} ms"


def same(got: torch.Tensor, truth: torch.Tensor) -> bool:
    """Up to a few roundings of bfloat16 at the largest; NaN is not."""
    return bool((got - truth).abs().max() <= 2.0**-6 * truth.abs().max())


def said(op: str, up_to: int | None, tile: Tile, rows: list[Row], outcome: str) -> None:
    sizes = " ".join(f"{name} {value}" for name, value in tile.items())
    registers, shared = max(row.registers for row in rows), max(row.shared_bytes for row in rows)
    occupancy, faults = min(row.occupancy for row in rows), ", ".join(row.fault for row in rows if row.fault)
    needs = f"{registers} registers, {shared >> 10} KiB, {occupancy:.0%}"
    print(f"{op} up to {up_to}: {sizes}: {faults or f'{needs}, {outcome}'}", flush=True)


def fastest(op: str, arch: int, bucket: dict[str, Any], tiles: Iterable[Tile], until: float) -> Tile:
    """Of these tiles and today's, which is timed first; others only until then (as monotonic counts)."""
    up_to, today = bucket["up_to"], {name: value for name, value in bucket.items() if name != "up_to"}
    run = call(op, up_to or MOST_ROWS)
    truth: torch.Tensor | None = None
    found: list[tuple[float, Tile]] = []
    for tile in (today, *(tile for tile in tiles if tile != today)):
        if found and monotonic() > until:
            print(f"{op} up to {up_to}: no time for more", flush=True)
            break
        row = compile_variant(listed(op, arch, tile)[0], arch)
        ms, outcome = (math.inf, "") if row.fault else timed(run, truth)
        said(op, up_to, tile, [row], outcome)
        if tile == today:
            truth, ms = None if ms == math.inf else run(), ms * (1 - LEAST_GAIN)
        found.append((ms, tile))
    better = (tile for ms, tile in sorted(found, key=lambda pair: pair[0]) if ms < found[0][0])
    return next((tile for tile in better if not any(row.fault for row in compiled(op, arch, tile))), today)


def possible(op: str, arch: int, bucket: dict[str, Any], tiles: Iterable[Tile]) -> None:
    """Prints what would become of each, without a GPU."""
    for tile in tiles:
        said(op, bucket["up_to"], tile, compiled(op, arch, tile), "not timed")


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
    parser.add_argument("--all", action="store_true", help="every tile and bucket")
    parser.add_argument("--seconds", type=float, help=f"for all; default {SECONDS}, no end with --all")
    parser.add_argument("--write", type=Path, nargs="?", const=FOLDER, metavar="FOLDER", help="default: the package's")
    options = parser.parse_args(arguments)
    here = tuning.nearest(capability(torch.device("cuda"))) if torch.cuda.is_available() else None
    arch = options.arch or here
    if arch is None:
        parser.error("no CUDA GPU is here: name an --arch, to see what could run there")
    if options.write and arch != here:
        parser.error(f"--write: got --arch {arch}, expected that of this GPU ({here or 'there is none'})")
    tune(options, arch, timed=arch == here)
    return 0


def tune(options: argparse.Namespace, arch: int, timed: bool) -> None:
    name = f"sm_{arch}.json"
    table = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    ops = [op for op in options.op or OPS if op in table]
    seconds = options.seconds or (math.inf if options.all else SECONDS)
    end = monotonic() + seconds
    for number, op in enumerate(ops):
        until = monotonic() + (end - monotonic()) / (len(ops) - number)
        for bucket in table[op] if options.all else table[op][-1:]:
            tiles = every_tile(op, bucket["up_to"]) if options.all else short_list(op, arch)
            if timed:
                bucket |= fastest(op, arch, bucket, tiles, until)
            else:
                possible(op, arch, bucket, tiles)
        if options.write:
            (options.write / name).write_text(written(table), encoding="utf-8")
    if options.write:
        print(
            f"{options.write / name}: before a commit, tools/compile_kernels.py --arch {arch} and the tests of kernels"
        )


if __name__ == "__main__":
    sys.exit(main())
