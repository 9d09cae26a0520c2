"""The tool that chooses tiles: what it lets pass, and what it writes. Times need a GPU."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from zimage_kernels import tuning
from zimage_kernels.aot import Variant

pytest.importorskip("triton")

import tune_kernels

TOOLS = Path(__file__).parents[2] / "tools"
LINEAR = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "GROUP_M": 8, "DOTS": 2, "num_warps": 8, "num_stages": 4}


@pytest.fixture(autouse=True)
def _tuning(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tool replaces the table of tiles; everybody else gets it back."""
    monkeypatch.setattr(tuning, "load", tuning.load)
    yield
    tuning.choose.cache_clear()


@pytest.mark.parametrize("arch", tuning.ARCHITECTURES)
def test_files_are_as_the_tool_writes_them(arch: int) -> None:
    text = (tune_kernels.FOLDER / f"sm_{arch}.json").read_text(encoding="utf-8")
    assert tune_kernels.written(json.loads(text)) == text


@pytest.mark.parametrize("arch", [arch for arch in tuning.ARCHITECTURES if arch >= 80])
def test_what_ships_is_among_the_candidates(arch: int) -> None:
    table = json.loads((tune_kernels.FOLDER / f"sm_{arch}.json").read_text(encoding="utf-8"))
    for op, buckets in table.items():
        for bucket in buckets:
            assert without_bound(bucket) in list(tune_kernels.every_tile(op, bucket["up_to"]))


@pytest.mark.parametrize("arch", [arch for arch in tuning.ARCHITECTURES if arch >= 80])
@pytest.mark.parametrize("op", tune_kernels.OPS)
def test_the_short_list(op: str, arch: int) -> None:
    """Few enough, each once, and each one that the long list has: nothing is misspelt."""
    tiles = tune_kernels.short_list(op, arch)
    everything = list(tune_kernels.every_tile(op, None))
    assert 5 <= len(tiles) <= 10 and all(tiles.count(tile) == 1 and tile in everything for tile in tiles)
    assert set(without_bound(tuning.load(arch)[op][-1])) == set(tiles[0])


def without_bound(bucket: dict[str, Any]) -> dict[str, int]:
    return {name: value for name, value in bucket.items() if name != "up_to"}


class Gpu:
    """What the tool finds on a pretended GPU of 8.6. slow: milliseconds of each tile by its sizes; broken: what gives
    other results; spilling: part of the name of variants that fall short. tried: tiles that were timed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.milliseconds: dict[str, float] = {}
        self.broken: set[str] = set()
        self.spilling: set[str] = set()
        self.tried: list[str] = []
        self.compiled: list[str] = []
        self.now = 0.0
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(tune_kernels, "capability", lambda device: 86)
        monkeypatch.setattr(tune_kernels, "compile_variant", self._compile)
        monkeypatch.setattr(tune_kernels, "call", lambda op, rows: lambda: self._run(op))
        monkeypatch.setattr("triton.testing.do_bench", self._bench)
        monkeypatch.setattr(tune_kernels, "monotonic", lambda: self.now)

    def tile(self, op: str) -> str:
        (bucket,) = tuning.load(86)[op]
        return f"{op} {sizes(bucket)}"

    def _compile(self, variant: Variant, arch: int) -> tune_kernels.Row:
        self.now += 1
        self.compiled.append(variant.name)
        fault = "spilled" if any(part in variant.name for part in self.spilling) else ""
        return tune_kernels.Row(arch, variant.name, variant.num_warps, variant.num_stages, fault=fault)

    def _run(self, op: str) -> torch.Tensor:
        self.last = self.tile(op)
        return torch.full((2,), 2.0 if self.last in self.broken else 1.0)

    def _bench(self, run: Any, quantiles: list[float]) -> float:
        run()
        self.tried.append(self.last)
        if self.milliseconds.get(self.last) == 0:
            raise RuntimeError("out of resources")
        return self.milliseconds.get(self.last, 10.0)


def sizes(tile: dict[str, Any]) -> str:
    return " ".join(
        str(tile[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages") if name in tile
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def kept(folder: Path) -> dict[str, str]:
    """op -> the tile of its last bucket, as it was written."""
    table = json.loads((folder / "sm_86.json").read_text(encoding="utf-8"))
    return {op: f"{op} {sizes(buckets[-1])}" for op, buckets in table.items()}


TODAY = {op: f"{op} {sizes(buckets[-1])}" for op, buckets in tuning.load(86).items()}


def test_the_fastest_that_ships_is_written(gpu: Gpu, tmp_path: Path) -> None:
    """Fast are here one that is wrong, one that fails and one that spills with low-rank terms; one is hardly faster."""
    gpu.milliseconds = {
        "linear_int8 256 128 32 8 3": 1.0, "linear_int8 64 256 32 8 4": 2.0, "linear_int8 128 64 64 4 3": 0.0,
        "linear_int8 128 256 32 8 3": 3.0, "swiglu_int8 128 64 32 8 3": 9.9,
    }  # fmt: skip
    gpu.broken, gpu.spilling = {"linear_int8 256 128 32 8 3"}, {"64x256x32 low-rank"}
    assert tune_kernels.main(["--write", str(tmp_path)]) == 0
    assert kept(tmp_path) == TODAY | {"linear_int8": "linear_int8 128 256 32 8 3"}


def test_today_is_first_and_only_winners_are_compiled_whole(gpu: Gpu, tmp_path: Path) -> None:
    gpu.milliseconds = {"linear_int8 64 256 32 8 4": 2.0}
    tune_kernels.main(["--op", "linear_int8", "--op", "attention_int8", "--write", str(tmp_path)])
    assert gpu.tried[0] == TODAY["linear_int8"] and TODAY["attention_int8"] in gpu.tried
    others = [name for name in gpu.compiled if name.startswith("linear_int8") and "low-rank" in name]
    assert others and all(name.startswith("linear_int8 64x256x32 low-rank") for name in others)
    attention = [name for name in gpu.compiled if name.startswith("attention")]
    assert attention and all(name.endswith("fp16 sums") for name in attention)  # as pictures are drawn on GeForce


def test_time_is_shared_and_what_is_found_is_kept(gpu: Gpu, tmp_path: Path) -> None:
    """A compilation takes a second, and there are eight for four ops: each gets today's and another or two."""
    gpu.milliseconds = dict.fromkeys(TODAY.values(), 20.0)
    tune_kernels.main(["--seconds", "8", "--write", str(tmp_path)])
    assert set(TODAY.values()) <= set(gpu.tried) and len(gpu.tried) < 16
    assert kept(tmp_path)["linear_int8"] != TODAY["linear_int8"]


def test_what_was_found_before_the_end_is_written(gpu: Gpu, tmp_path: Path) -> None:
    """Killed within the second op, the first one's tile is there."""
    gpu.milliseconds = {"linear_int8 128 256 32 8 3": 3.0}

    def bench(run: Any, quantiles: list[float]) -> float:
        if gpu.tried and gpu.tried[-1].startswith("swiglu"):
            raise KeyboardInterrupt
        return Gpu._bench(gpu, run, quantiles)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("triton.testing.do_bench", bench)
        tune_kernels.main(["--write", str(tmp_path)])
    assert kept(tmp_path) == TODAY | {"linear_int8": "linear_int8 128 256 32 8 3"}


CODE = """
import tune_kernels
good = {good}
for tile in (good, good | dict(BLOCK_M=256, BLOCK_N=256)):
    print([row.fault for row in tune_kernels.compiled("linear_int8", 86, tile)])
"""


@pytest.mark.slow  # compiles
def test_a_tile_that_falls_short_is_out() -> None:
    """256 x 256 int32 sums are 256 registers for each of 256 threads, and 8.6 has 255."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(TOOLS), str(TOOLS.parent / "kernels"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    code = CODE.format(good=LINEAR)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    good, bad = done.stdout.splitlines()
    assert set(ast.literal_eval(good)) == {""}
    assert all("spilled" in fault or "shared" in fault for fault in ast.literal_eval(bad))


def test_nothing_is_written_for_another_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        tune_kernels.main(["--arch", "75", "--write"])
    assert "--write: got --arch 75" in capsys.readouterr().err
