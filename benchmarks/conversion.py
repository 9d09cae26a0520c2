"""How long the full-size transformer takes to convert, beside copying the same bytes and beside ggml's own quantizer.

    python tools/make_checkpoint.py CHECKPOINT --size full --dtype bf16
    python benchmarks/conversion.py CHECKPOINT/transformer --work FOLDER --out benchmarks/results/NAME.json

Before each measurement the source is evicted from the page cache, and each one ends when its output is synced to the
disk. A copy reads as many bytes as the conversion and writes as many as its output has. Peak memory is the operating
system's figure for the finished process. FOLDER needs room for the largest output, 8 GB; outputs are deleted.

--ggml LIBRARY also times ggml_quantize_chunk of a shared library (made of ggml.c and ggml-quants.c, gcc -O2) on as many
threads as there are cores: on one block of the model, in the types that the recipe gives it, times the number of
blocks. That is the arithmetic alone, from memory to memory; for comparison, ours is timed in the same way.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from full_size import machine, run

from zimage_lite import __version__
from zimage_lite.bench.machine import commit
from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.convert.output_file import OutTensor, output_tensors
from zimage_lite.convert.recipe import target
from zimage_lite.quant.formats import FORMATS, GGML_TYPES

FORMATS_MEASURED = ("q8_0", "q4_0", "q4_k_m", "int8", "int4", "nf4")
BUFFER_BYTES = 2**23
GGML_TARGETS = ("q4_k_m",)
CHUNK_WEIGHTS = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a transformer: a file, or a folder of shards")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--formats", nargs="+", default=FORMATS_MEASURED)
    parser.add_argument("--effort", default="reference")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--ggml", type=Path, metavar="LIBRARY")
    args = parser.parse_args()
    rows = []
    for name in args.formats:
        rows.append(measure(args.source.resolve(), name, args.work, args.effort, args.repeats))
        print(json.dumps(rows[-1]), flush=True)
    report = {"machine": machine(), "version": __version__, "commit": commit(), "effort": args.effort, "rows": rows}
    if args.ggml:
        report["ggml"] = [against_ggml(args.source, name, args.ggml) for name in GGML_TARGETS]
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def measure(source: Path, name: str, work: Path, effort: str, repeats: int) -> dict[str, Any]:
    """Conversions and copies in turn; a virtual machine's disk and memory vary, so the best of each counts."""
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    out = work / f"converted{target(name).suffix}"
    seconds, copies, peak, out_bytes = [], [], 0, 0
    for _ in range(repeats):
        evict(files)
        result = run(work, "quantize", source, "-o", out.name, "--to", name, "--effort", effort)
        seconds.append(result["wall_seconds"])
        peak, out_bytes = max(peak, result["max_rss_bytes"]), out.stat().st_size
        out.unlink()
        evict(files)
        copies.append(round(copy(files, work / "copied.tmp", out_bytes), 1))
    return {
        "format": name,
        "seconds": min(seconds),
        "copy_seconds": min(copies),
        "ratio": round(min(seconds) / min(copies), 2),
        "all_seconds": seconds,
        "all_copy_seconds": copies,
        "max_rss_bytes": peak,
        "source_bytes": sum(file.stat().st_size for file in files),
        "bytes": out_bytes,
    }


def evict(files: list[Path]) -> None:
    """Drop the files from the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy(files: list[Path], out: Path, out_bytes: int) -> float:
    """Seconds to read all files and to write so many bytes, evenly in between."""
    start = time.perf_counter()
    share, buffer, left = out_bytes / sum(file.stat().st_size for file in files), bytearray(BUFFER_BYTES), out_bytes
    with open(out, "wb", buffering=0) as target_file:
        for file in files:
            with open(file, "rb", buffering=0) as source_file:
                while got := source_file.readinto(buffer):
                    n_bytes = min(left, int(got * share) + 1)
                    target_file.write(memoryview(buffer)[:n_bytes])
                    left -= n_bytes
        os.fsync(target_file.fileno())
    seconds = time.perf_counter() - start
    out.unlink()
    return seconds


def against_ggml(source: Path, name: str, library: Path) -> dict[str, Any]:
    """Seconds of arithmetic for all main blocks: ggml's and ours."""
    import torch

    torch.set_num_threads(1)
    checkpoint = open_checkpoint(source)
    wanted = [tensor for tensor in output_tensors(checkpoint, target(name)) if tensor.name.startswith("layers.0.")]
    weights = {t.name: torch.cat([part.read_float() for part in t.sources]) for t in wanted if is_packed(t)}
    blocks = checkpoint.config.n_layers
    ggml = ggml_quantizer(library)
    jobs = [(t, weights[t.name][i : i + step]) for t in wanted if is_packed(t) for step in [CHUNK_WEIGHTS // t.columns]
            for i in range(0, t.rows, step)]  # fmt: skip
    ours_seconds = timed(lambda job: job[0].format.codec.quantize(job[1], {}), jobs)
    ggml_seconds = timed(lambda job: ggml(job[0].format.name, job[1]), jobs)
    n_weights = sum(rows.numel() for _, rows in jobs)
    return {
        "format": name,
        "weights_timed": n_weights,
        "blocks": blocks,
        "threads": os.cpu_count(),
        "ggml_seconds": round(ggml_seconds * blocks, 1),
        "our_seconds": round(ours_seconds * blocks, 1),
        "ratio": round(ggml_seconds / ours_seconds, 2),
        "ggml_weights_per_second": round(n_weights / ggml_seconds),
        "our_weights_per_second": round(n_weights / ours_seconds),
    }


def is_packed(tensor: OutTensor) -> bool:
    return tensor.format.family == "ggml"


def timed(work: Callable[[Any], object], jobs: list[Any]) -> float:
    """Seconds for all jobs on as many threads as there are cores, after a first one that may compile."""
    for job in {job[0].format.name: job for job in jobs}.values():
        work(job)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        start = time.perf_counter()
        list(pool.map(work, jobs))
        return time.perf_counter() - start


def ggml_quantizer(library: Path) -> Callable[[str, Any], None]:
    """ctypes releases Python's lock during a call, so ggml runs on several threads as well."""
    handle = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    function = handle.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def quantize(name: str, rows: Any) -> None:
        count, columns = rows.shape
        row = FORMATS[name]
        out = ctypes.create_string_buffer(row.nbytes(count, columns))
        function(GGML_TYPES[name][0], rows.contiguous().data_ptr(), out, 0, count, columns, None)

    return quantize


if __name__ == "__main__":
    main()
