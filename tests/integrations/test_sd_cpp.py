"""Our GGUF files in stable-diffusion.cpp: a picture of one step from the same noise, beside ours.

It knows Z-Image in the true size alone. Skipped where SD_CPP does not name its program (sd-cli), or SD_CPP_MODEL a
folder that `zimage-lite quantize --to q8_0` wrote of a model in its true size: 11 GB, of which it takes as much RAM.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import psnr
from PIL import Image
from with_sd_cpp import files_in

from zimage_lite.cli import run

pytestmark = [pytest.mark.slow, pytest.mark.full_size]

PROMPT, SIDE, SEED = "a red fox in the snow, 一只红狐", "128", "5"


def named(variable: str) -> str:
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set")
    return os.environ[variable]


def pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB")))


def test_a_step_is_ours(tmp_path: Path) -> None:
    """It multiplies q8_0 by inputs rounded to 8 bits in groups of 32; we round them by rows, or not at all."""
    program, model = named("SD_CPP"), Path(named("SD_CPP_MODEL"))
    files, ours, theirs = files_in(model), tmp_path / "ours.png", tmp_path / "theirs.png"
    command = [program, "--diffusion-model", files["diffusion_model"], "--llm", files["llm"], "--vae", files["vae"]]
    command += ["--prompt", PROMPT, "--width", SIDE, "--height", SIDE, "--steps", "1", "--seed", SEED, "--rng", "cpu"]
    command += ["--cfg-scale", "1", "--sampling-method", "euler", "--flow-shift", "3", "--output", str(theirs)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-2000:]
    options = ["--width", SIDE, "--height", SIDE, "--steps", "1", "--seed", SEED, "--no-cache", "-o", str(ours)]
    assert run(["generate", PROMPT, "--model", str(model), *options]) == 0
    found = psnr(pixels(ours), pixels(theirs), 255)
    print(f"{found:.1f} dB")
    assert found >= 35
