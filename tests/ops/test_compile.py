"""The ahead-of-time compiler: representative kernels for one laptop pass it, and what is wrong does not.

CI runs the tool itself over every tile and architecture. It needs a process of its own, without the interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from compile_kernels import LIMITS, fault, matrix_instructions, occupancy
from zimage_kernels import tuning
from zimage_kernels.aot import Variant

from zimage_lite.doctor.selftest.verdicts import COMPILATIONS

pytestmark = pytest.mark.slow  # compiles for every architecture

ROOT = Path(__file__).parents[2]
HELPERS = ROOT / "tests" / "helpers"
GEMM = Variant("gemm", None, {}, {}, (), matrix=("s8",))


def run(*arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON of the last line and standard error of a Python process that interprets no kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tools")))
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


def test_representative_kernels() -> None:
    only = ["linear_int8 128x128x32 low-rank", "swiglu_int8 128x64x32 low-rank", "attention_int8 fp16 128x64 fp16 sums"]
    only.append("linear_int8 128x128x32 low-rank to fp16")
    tool = str(ROOT / "tools" / "compile_kernels.py")
    code, printed, errors = run(tool, "--arch", "86", "--json", *(f"--only={name}" for name in only))
    assert code == 0, errors
    assert sorted(row["name"] for row in printed["rows"]) == sorted(only)
    for row in printed["rows"]:
        assert "mma.s8" in row["matrix"] and row["registers"] > 32 and row["shared_bytes"] > 0 and not row["fault"]


def test_unpacked_rows_are_rotated_where_they_are() -> None:
    """In registers: of shared memory they take what the maximum of a row over 8 warps does, as 16-bit rows do."""
    tool = str(ROOT / "tools" / "compile_kernels.py")
    only = [f"dequantize {kind} 3840 to i8" for kind in ("q8_0", "q4_k", "q6_k")] + ["quantize fp16 3840"]
    code, printed, errors = run(tool, "--arch", "86", "--json", *(f"--only={name}" for name in only))
    assert code == 0, errors
    assert {row["name"]: row["shared_bytes"] for row in printed["rows"]} == dict.fromkeys(only, 32)


SPOILT = """
import sys, compile_kernels
from zimage_kernels import swiglu_int8
chosen = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": 3}
sys.modules["zimage_kernels.swiglu_int8"].tiles = lambda op, arch: [chosen]
sys.exit(compile_kernels.main("--arch 86 --arch 75 --only 128x128x64 --json".split()))
"""


def test_what_is_wrong_is_found() -> None:
    """Two accumulators of 128x128 and the low-rank terms do not fit 256 threads; 7.5 has no int8 product at all."""
    code, printed, errors = run("-c", SPOILT)
    assert code == 1, errors
    faults = {(row["arch"], row["name"]): row["fault"] for row in printed["rows"]}
    assert "bytes spilled" in faults[86, "swiglu_int8 128x128x64 low-rank"]
    assert "does not compile" in faults[75, "swiglu_int8 128x128x64 low-rank"]


def test_what_is_launched_is_what_was_compiled() -> None:
    """Types, constants, alignment, warps and stages: else the table would be of kernels that nobody runs. The number of
    rows is no part of it, so that a new image size compiles nothing."""
    code, printed, errors = run(str(HELPERS / "recorded_launches.py"))
    assert code == 0, errors
    assert printed == {"unknown": [], "not_launched": []}


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        pytest.param(86, "int8", marks=pytest.mark.full_size),
        (86, "q4_k_m"),
        pytest.param(75, "int4", marks=pytest.mark.full_size),
    ],
)
def test_what_pictures_compile(arch: int, name: str) -> None:
    """Only what the self-test compiles, which says how many, and the compile tool, too; a picture of another size
    nothing more, and one with a LoRA nothing else."""
    code, printed, errors = run(str(HELPERS / "recorded_pictures.py"), str(arch), name)
    assert code == 0, errors
    assert printed["unchecked"] == printed["added"] == printed["of_a_lora"] == printed["unknown"] == []
    assert printed["used"] < printed["checked"] <= COMPILATIONS
    table = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| `{name}` \| (\d+) \| (\d+) \|$", table, re.MULTILINE)
    assert row and int(row[1 if arch == 86 else 2]) == printed["used"]
    assert arch == 75 or printed["checked"] > COMPILATIONS - 5


def test_faults() -> None:
    assert fault(GEMM, 86, ["mma.s8"], 0, 99 * 1024) == ""
    assert fault(GEMM, 86, ["mma.bf16"], 0, 0) == "no tensor-core instruction for s8"
    assert fault(GEMM, 86, ["mma.s8"], 16, 0) == "16 bytes spilled"
    assert fault(GEMM, 86, ["mma.s8"], 0, 100 * 1024) == "shared memory over 99 KiB"
    assert fault(GEMM, 90, ["wgmma.s8"], 0, 100 * 1024) == ""


def test_instructions_are_read_from_ptx() -> None:
    ptx = """
        mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 {%r1}, {%r2}, {%r3}, {%r4};
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r2}, {%r3}, {%f4};
        wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {%f1}, %rd1, %rd2, 1, 1, 1, 0, 0;
        wgmma.fence.sync.aligned; // mma
    """
    assert matrix_instructions(ptx) == ["mma.bf16", "mma.s8", "wgmma.f16"]


def test_occupancy() -> None:
    """By hand: 245 registers take 8 * 8192 of 65536 for 8 warps; 128 take half of that, 32 blocks of one warp the most
    on 8.0; 48 KiB and the reserved one fit twice into 100."""
    assert occupancy(86, 8, 245, 0) == 8 / 48
    assert occupancy(86, 8, 128, 48 * 1024) == 16 / 48
    assert occupancy(80, 1, 16, 0) == 32 / 64


def test_every_tile_is_the_same_at_any_number_of_rows_of_its_bucket() -> None:
    for arch in tuning.ARCHITECTURES:
        for op, buckets in tuning.load(arch).items():
            bounds = [bucket["up_to"] for bucket in buckets]
            assert bounds[-1] is None and sorted(bounds[:-1]) == bounds[:-1]
            for rows in (1, 16, 17, 64, 65, 129, 4224, 10**6):
                assert tuning.choose(op, rows, arch) in tuning.tiles(op, arch)


def test_newer_hardware_takes_the_tiles_of_the_next_older() -> None:
    assert [tuning.nearest(arch) for arch in (75, 87, 100, 120, 121)] == [75, 86, 90, 120, 120]
    assert set(LIMITS) == set(tuning.ARCHITECTURES)
    with pytest.raises(ValueError, match="compute capability: got 61, expected at least 75"):
        tuning.nearest(61)
