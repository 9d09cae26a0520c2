"""stable-diffusion.cpp beside ours: its options, its command line and its log, with a pretended program."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import with_sd_cpp
from peer_cases import PEERS, TIER, WORK, needs_posix

from zimage_lite.bench.tiers import DONE, FAILED, NOT_RUN, OOM
from zimage_lite.page.html import as_html
from zimage_lite.report.sections import sections

HELP = """stable-diffusion.cpp version of a test
usage: sd-cli [options]
  -o, --output <string>       path to write result image to
  -h, --help                  show this help message and exit, see also --not-an-option
  --llm <string>              path to the llm text encoder
  --diffusion-model <string>  path
  --vae <string>              path
  --max-vram <GiB>            budget, with --stream-layers
  --stream-layers             stream
  --layer-prefetch-depth <N>  ahead
  --vae-tiling                tiles
  --offload-to-cpu            RAM
  --diffusion-fa              flash attention
"""
OLD_HELP = "  --qwen2vl <string>  path\n  --diffusion-fa  x\n  --offload-to-cpu  x\n"
LOG = """[INFO ] stable-diffusion.cpp:1 - loading tensors completed, taking 3.10s
[INFO ] stable-diffusion.cpp:2 - get_learned_condition completed, taking 700 ms
[INFO ] stable-diffusion.cpp:3 - sampling completed, taking 7.00s
[INFO ] stable-diffusion.cpp:4 - decode_first_stage completed, taking 1.20s
[INFO ] stable-diffusion.cpp:5 - generate_image completed in 9.10s
"""


def settings(way: str, device: str = "cuda", program: str = "/bin/sd") -> dict[str, Any]:
    files = {"diffusion_model": "/m/t.gguf", "llm": "/m/e.gguf", "vae": "/m/v.safetensors"}
    return {**files, "device": device, "way": way, "program": program}


def test_options_are_those_of_its_help() -> None:
    assert with_sd_cpp.known_options(HELP) >= {"--output", "--max-vram", "--diffusion-fa"}
    assert "--not-an-option" not in with_sd_cpp.known_options(HELP)


def test_command_line_of_sd_cpp() -> None:
    work = replace(WORK, vram_bytes=TIER.vram_bytes)
    found = with_sd_cpp.command_line(settings("flash attention, streamed layers"), work, HELP)
    assert found[:6] == ["--diffusion-model", "/m/t.gguf", "--llm", "/m/e.gguf", "--vae", "/m/v.safetensors"]
    pairs = dict(pairwise(found))
    assert (pairs["--width"], pairs["--height"], pairs["--steps"], pairs["--cfg-scale"]) == ("64", "64", "4", "1.0")
    cap = 6 - 0.3e9 / 2**30  # what the desktop leaves of 6 GiB
    assert float(pairs["--max-vram"]) == pytest.approx(cap, abs=0.01)
    assert found[-8:-2] == [
        "--diffusion-fa",
        "--offload-to-cpu",
        "--vae-tiling",
        "--max-vram",
        f"{cap:.2f}",
        "--stream-layers",
    ]
    assert found[-2:] == ["--layer-prefetch-depth", "1"]
    found = with_sd_cpp.command_line(settings("flash attention, weights in RAM"), work, OLD_HELP)
    assert found[2] == "--qwen2vl" and found[-2:] == ["--diffusion-fa", "--offload-to-cpu"]
    found = with_sd_cpp.command_line(settings("flash attention", "cpu"), WORK, "--llm x\n")
    assert found[-1] == "image.png"  # nothing that this version has no name for


def test_what_the_log_of_sd_cpp_says() -> None:
    """7 s of sampling, of which the last three steps took 2, 1.5 and 1; without moments, a quarter each."""
    found = with_sd_cpp.told_by(LOG, [10.0, 12.0, 13.5, 14.5], 4)
    assert found == {"seconds": 9.1, "step_seconds": [2.5, 2.0, 1.5, 1.0]}
    assert with_sd_cpp.told_by(LOG, [10.0], 4)["step_seconds"] == [1.75] * 4
    with pytest.raises(ValueError, match="no image"):
        with_sd_cpp.told_by("[INFO ] nothing of use", [], 4)
    no_memory = "[ERROR] ggml: failed to allocate 4.00 GiB\n[ERROR] generate failed\n"
    assert with_sd_cpp.failure(no_memory, 1) == {"outcome": OOM, "reason": "[ERROR] ggml: failed to allocate 4.00 GiB"}
    wrong = "[ERROR] unknown tensor\n[INFO ] bye\n"
    assert with_sd_cpp.failure(wrong, 1) == {"outcome": FAILED, "reason": "[ERROR] unknown tensor"}
    assert with_sd_cpp.failure("", -11) == {"outcome": FAILED, "reason": "ended with -11"}


FAKE = f"""#!{sys.executable}
import sys, time
if "--help" in sys.argv: print({HELP!r}); sys.exit()
assert all(open(sys.argv[sys.argv.index(name) + 1], "rb").read(1) for name in ("--llm", "--diffusion-model", "--vae"))
held = b"x" * 150_000_000
print("  |==>  | 4/686 - 6.66it/s", end="")
for step in range(1, 5):
    print(f"\\r  |==>  | {{step}}/4 - 2.00s/it", end="", flush=True)
    time.sleep(0.05)
print({LOG!r})
"""


@needs_posix
def test_ways_that_a_version_lacks(tmp_path: Path) -> None:
    program = tmp_path / "sd-cli"
    program.write_text(f"#!/bin/sh\necho '{OLD_HELP}'\n")
    program.chmod(0o755)
    found = with_sd_cpp.by_program(settings("flash attention, streamed layers", program=str(program)), WORK)
    assert found == {"outcome": NOT_RUN, "reason": "this version has no --stream-layers"}
    found = with_sd_cpp.by_program(settings("flash attention", "cpu", program="/no/such/sd-cli"), WORK)
    assert found == {"outcome": FAILED, "reason": "sd-cli: No such file or directory"}


@pytest.mark.slow  # a process for each case
@needs_posix
def test_the_whole_command(q8_0: Path, tmp_path: Path) -> None:
    """As people run it, with a program that pretends, on what `quantize` wrote: seconds are those of its log, those of
    steps go by the clock, and its memory is its own."""
    program, out = tmp_path / "sd-cli", tmp_path / "result.json"
    program.write_text(FAKE)
    program.chmod(0o755)
    command = [
        sys.executable, PEERS / "run.py", "--quantized", q8_0, "--sd-cpp", program, "--device", "cpu", "--size", "64",
        "--steps", "4", "--repeats", "1", "--only", "stable-diffusion.cpp*", "diffusers*", "--out", out,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "Measures 1 of 4 cases on the CPU. Not run: 3: needs --model"
    result = json.loads(lines[-1])
    assert result == json.loads(out.read_text()) and str(tmp_path) not in lines[-1]
    row = result["rows"][-1]
    assert (row["outcome"], row["setting"], row["version"]) == (DONE, "q8_0, flash attention", HELP.splitlines()[0])
    assert row["seconds"]["cold"] == row["seconds"]["warm"]["median"] == 9.1
    for image in row["runs"]:
        assert len(image["step_seconds"]) == 4 and min(image["step_seconds"]) >= 0.04  # 0.05 slept; clocks round
    assert 150_000_000 < row["peak_rss_bytes"] < 200_000_000
    assert "--diffusion-fa" in row["command"] and "--offload-to-cpu" not in row["command"]
    assert "stable-diffusion.cpp" in as_html("t", sections({"peers.json": result}))
