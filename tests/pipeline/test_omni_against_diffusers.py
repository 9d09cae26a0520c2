"""Pictures that are drawn from pictures and words, against diffusers' ZImageOmniPipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import PROMPT, psnr
from PIL import Image

from zimage_lite.checkpoint.model_files import open_model
from zimage_lite.config import GenerateOptions, RuntimeOptions
from zimage_lite.pipeline.drawing import Pipeline

SIZES = ((160, 144), (256, 100), (72, 200))  # of references: width and height
STEPS = 3


def pictures(count: int) -> tuple[Image.Image, ...]:
    rng = np.random.default_rng(7)
    small = [rng.integers(0, 256, (6, 6, 3), dtype=np.uint8) for _ in SIZES[:count]]
    return tuple(Image.fromarray(one).resize(size) for one, size in zip(small, SIZES, strict=False))


@pytest.fixture(scope="module")
def pipeline(omni_folder: Path) -> Pipeline:
    return Pipeline(open_model(omni_folder), RuntimeOptions(device="cpu"))


@pytest.fixture(autouse=True)
def _float32_vae(monkeypatch: pytest.MonkeyPatch, omni: Any) -> None:
    """diffusers hands its VAE bfloat16, which a VAE in float32 refuses."""
    encode = omni.vae.encode
    monkeypatch.setattr(omni.vae, "encode", encode)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor)


def theirs(omni: Any, case: GenerateOptions) -> torch.Tensor:
    found = omni(
        image=list(case.references) if case.references else None,
        prompt=case.prompt,
        height=case.height,
        width=case.width,
        num_inference_steps=case.steps,
        guidance_scale=case.guidance,
        negative_prompt=case.negative if case.guidance else None,
        generator=torch.Generator("cpu").manual_seed(case.seed),
        output_type="np",
    )
    return torch.from_numpy(np.asarray(found.images[0])).mul(255).round()


@pytest.mark.parametrize("guidance", [0.0, 3.0])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_picture(omni: Any, pipeline: Pipeline, count: int, guidance: float) -> None:
    size = ((128, 128), (208, 96), (None, None))[count]
    case = GenerateOptions(
        PROMPT, *size, steps=STEPS, seed=3, guidance=guidance, negative="grey", references=pictures(count)
    )
    (found,) = pipeline.generate([case])
    wanted = theirs(omni, case)
    assert found.shape == wanted.shape
    assert psnr(found.float(), wanted, 255) >= 60
