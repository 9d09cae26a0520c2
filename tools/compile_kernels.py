"""Compile every kernel at every tile of the tuning files, for every architecture, without a GPU, and judge the result.

    python tools/compile_kernels.py [--arch 86 --arch 120] [--only "int8 128x128"] [--json]

Prints one row per compilation: matrix instruction, registers, spilled bytes, shared memory, occupancy. Exits 1 when one
falls short: a product without tensor cores, any spill, more shared memory than a block can have, or a failed build.

To register a kernel, its op module in zimage_kernels has a function `variants(arch: int) -> list[Variant]`
(see zimage_kernels/aot.py), which takes its tiles from `tuning.tiles(op, arch)`. Nothing else is needed: every module
of the package is asked. For example

    def variants(arch: int) -> list[Variant]:
        return [
            Variant(
                name=f"dequantize {dtype} {tile['BLOCK']}",
                kernel=_dequantize_kernel,
                signature={"codes": "*u8", "scale": "*fp16", "out": f"*{dtype}", "count": "i32"},
                constexprs={"BLOCK": tile["BLOCK"]},
                aligned=("codes", "scale", "out", "count"),  # what the launcher guarantees to be multiples of 16
                num_warps=tile["num_warps"],
                num_stages=tile["num_stages"],
            )
            for tile in tiles("dequantize", arch)
            for dtype in ("fp16", "bf16")
        ]
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
import zimage_kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from zimage_kernels._triton import OPTIONS, interpreted
from zimage_kernels.aot import Variant
from zimage_kernels.tuning import ARCHITECTURES

# Of one multiprocessor: warps, blocks, shared memory; and shared memory of one block. KiB; the driver keeps 1 KiB of
# each block on 8.0 and newer. CUDA programming guide, table of technical specifications per compute capability.
LIMITS = {
    75: (32, 16, 64, 64),
    80: (64, 32, 164, 163),
    86: (48, 16, 100, 99),
    89: (48, 24, 100, 99),
    90: (64, 32, 228, 227),
    120: (48, 24, 100, 99),
}
REGISTERS = 65536  # of a multiprocessor, given out to warps in units of 256


@dataclass(frozen=True)
class Row:
    """What became of one variant. occupancy: resident warps of the possible ones; fault: empty where it may ship."""

    arch: int
    name: str
    warps: int
    stages: int
    matrix: str = ""
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    occupancy: float = 0.0
    seconds: float = 0.0
    fault: str = ""


def variants(arch: int) -> Iterator[Variant]:
    """Of every op module that has any."""
    for module in pkgutil.iter_modules(zimage_kernels.__path__):
        listed = getattr(importlib.import_module(f"zimage_kernels.{module.name}"), "variants", None)
        if listed is not None:
            yield from listed(arch)


def build(variant: Variant, arch: int) -> triton.compiler.CompiledKernel:
    """The same code that a launch on that architecture would compile."""
    kernel = variant.kernel.jit_function
    names = kernel.arg_names
    assert set(names) == {*variant.signature, *variant.constexprs}, f"{variant.name}: arguments are {names}"
    source = ASTSource(
        kernel,
        signature={name: variant.signature.get(name, "constexpr") for name in names},
        constexprs=variant.constexprs,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **OPTIONS, **variant.options}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def matrix_instructions(ptx: str) -> list[str]:
    """For example ["wgmma.s8", "mma.f16"]: the kind and the type of the first operand of each product."""
    found = re.findall(r"\b(wgmma)\.mma_async\.sync\.aligned\.\w+\.\w+\.(\w+)\.", ptx)
    found += re.findall(r"\b(mma)\.sync\.aligned\.\w+\.row\.col(?:\.satfinite)?\.\w+\.(\w+)\.", ptx)
    return sorted({f"{kind}.{operand}" for kind, operand in found})


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack, as the assembler wrote them into the binary."""
    tool = Path(triton.backends.__file__).parent / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match, f"cuobjdump said {usage!r}"
    return int(match[1]), int(match[2])


def occupancy(arch: int, warps: int, registers: int, shared_bytes: int) -> float:
    """The part of a multiprocessor's warps that are resident at once."""
    most_warps, most_blocks, shared_kib, _ = LIMITS[arch]
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256) // warps
    reserved = 1024 if arch >= 80 else 0
    by_shared = shared_kib * 1024 // (shared_bytes + reserved) if shared_bytes + reserved else most_blocks
    return min(by_registers, by_shared, most_blocks, most_warps // warps) * warps / most_warps


def fault(variant: Variant, arch: int, matrix: list[str], spilled_bytes: int, shared_bytes: int) -> str:
    """Why the variant may not ship; empty where it may."""
    missing = [operand for operand in variant.matrix if not any(found.endswith(f".{operand}") for found in matrix)]
    if missing:
        return f"no tensor-core instruction for {', '.join(missing)}"
    if spilled_bytes:
        return f"{spilled_bytes} bytes spilled"
    if shared_bytes > LIMITS[arch][3] * 1024:
        return f"shared memory over {LIMITS[arch][3]} KiB"
    return ""


def compile_variant(variant: Variant, arch: int) -> Row:
    began = time.perf_counter()
    try:
        built = build(variant, arch)
    except Exception as error:  # noqa: BLE001 - a compiler can fail in any way, and the table must show it
        message = " ".join(f"{type(error).__name__} {error.__cause__ or ''} at {error}".split())[-300:]
        return Row(arch, variant.name, variant.num_warps, variant.num_stages, fault=f"does not compile: {message}")
    matrix = matrix_instructions(built.asm["ptx"])
    registers, spilled_bytes = resources(built.asm["cubin"])
    shared_bytes = built.metadata.shared
    return Row(
        arch=arch,
        name=variant.name,
        warps=variant.num_warps,
        stages=variant.num_stages,
        matrix=" ".join(matrix),
        registers=registers,
        spilled_bytes=spilled_bytes,
        shared_bytes=shared_bytes,
        occupancy=occupancy(arch, variant.num_warps, registers, shared_bytes),
        seconds=time.perf_counter() - began,
        fault=fault(variant, arch, matrix, spilled_bytes, shared_bytes),
    )


def line(row: Row) -> str:
    return (
        f"{row.arch:>4}  {row.name:<44} {row.warps:>5} {row.stages:>6}  {row.matrix:<16} {row.registers:>4} "
        f"{row.spilled_bytes:>6} {row.shared_bytes / 1024:>7.1f} {row.occupancy:>5.0%}  {row.fault or 'ok'}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--only", metavar="TEXT", action="append", help="variants whose name contains it; repeatable")
    parser.add_argument("--json", action="store_true", help="the rows as one JSON object on the last line")
    options = parser.parse_args(arguments)
    if interpreted():
        parser.error("TRITON_INTERPRET is set, and the interpreter compiles nothing")
    titles = ("registers", "spilled", "shared KiB", "occupancy")
    print(f"Triton {triton.__version__}; columns: arch, variant, warps, stages, matrix, {', '.join(titles)}, verdict")
    rows = []
    for arch in options.arch or ARCHITECTURES:
        for variant in variants(arch):
            if any(text in variant.name for text in options.only or [""]):
                rows.append(compile_variant(variant, arch))
                print(line(rows[-1]), flush=True)
    failed = sum(bool(row.fault) for row in rows)
    print(f"{len(rows)} compiled, {failed} fell short, {sum(row.seconds for row in rows):.0f} s")
    if options.json:
        print(json.dumps({"triton": triton.__version__, "rows": [asdict(row) for row in rows]}))
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
