"""The tool that chooses tiles: what it lets pass, and what it writes. Times need a GPU."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from zimage_kernels import tuning

pytest.importorskip("triton")

import tune_kernels

pytestmark = pytest.mark.slow  # compiles every tile that is tried

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
            tile = {name: value for name, value in bucket.items() if name != "up_to"}
            assert tile in list(tune_kernels.candidates(op, bucket["up_to"]))


CODE = """
import tune_kernels
good = {good}
for tile in (good, good | dict(BLOCK_M=256, BLOCK_N=256)):
    print([row.fault for row in tune_kernels.compiled("linear_int8", 86, tile)])
"""


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
