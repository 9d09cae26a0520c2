"""Pictures drawn over, and Base's guidance: by diffusers' own rules the same as its pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from marking import always
from oracles import PROMPT, psnr
from picture_files import hole, smooth
from torch import Tensor

from zimage_lite.checkpoint.model_files import open_model
from zimage_lite.config import GenerateOptions, RuntimeOptions
from zimage_lite.pipeline.drawing import Pipeline

pytestmark = pytest.mark.slow  # each picture twice

SIZES = {"even": (96, 64), "odd": (101, 83)}
STRENGTHS = (0.3, 0.6, 1.0)
GUIDED = {"guidance": 4.0, "negative": "blurry"}


@pytest.fixture(scope="module")
def pipeline(diffusers_folder: Path) -> Pipeline:
    return Pipeline(open_model(diffusers_folder), RuntimeOptions(device="cpu"))


@pytest.fixture(scope="module")
def parts(diffusers_pipeline: Any) -> dict[str, Any]:
    return dict(diffusers_pipeline.components)


def theirs(pipeline: Any, request: GenerateOptions, **more: Any) -> Tensor:
    result = pipeline(
        request.prompt,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance or 0.0,
        negative_prompt=request.negative if request.guidance else None,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        **more,
    )
    return torch.from_numpy(np.asarray(result.images[0]).copy())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("strength", "guided"), always((0.3, False), (0.6, True), of=[*((s, False) for s in STRENGTHS), (0.6, True)])
)
def test_image_to_image(parts, pipeline, size, strength, guided) -> None:
    from diffusers import ZImageImg2ImgPipeline

    request = GenerateOptions(
        PROMPT, steps=8, seed=3, image=smooth(SIZES[size]), strength=strength, strength_mode="diffusers",
        **(GUIDED if guided else {}),
    )  # fmt: skip
    truth = theirs(ZImageImg2ImgPipeline(**parts), request, image=request.image, strength=strength)
    ours = pipeline.generate([request])[0]
    assert truth.float().std() > 1
    assert psnr(ours, truth, 255) >= 50


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("strength", "guided"), always((0.6, False), (1.0, True), of=[*((s, False) for s in STRENGTHS), (1.0, True)])
)
def test_inpainting(parts, pipeline, size, strength, guided) -> None:
    from diffusers import ZImageInpaintPipeline

    width, height = (side // 16 * 16 for side in SIZES[size])
    request = GenerateOptions(
        PROMPT, steps=8, seed=4, image=smooth(SIZES[size]), mask=hole((width, height)), strength=strength,
        strength_mode="diffusers", **(GUIDED if guided else {}),
    )  # fmt: skip
    more = {"image": request.image, "mask_image": request.mask, "width": width, "height": height}
    truth = theirs(ZImageInpaintPipeline(**parts), request, strength=strength, **more)
    ours = pipeline.generate([request])[0]
    assert psnr(ours, truth, 255) >= 50


@pytest.mark.parametrize("normalization", always(0.0, 0.5, of=[0.0, 0.5, 1.0]))
@pytest.mark.parametrize("truncation", always(0.4, of=[0.4, 1.0]))
def test_guidance_of_base(diffusers_pipeline, pipeline, normalization, truncation) -> None:
    request = GenerateOptions(
        PROMPT, 96, 64, steps=6, seed=5, cfg_normalization=normalization, cfg_truncation=truncation, **GUIDED
    )
    more = {"cfg_normalization": normalization, "cfg_truncation": truncation, "width": 96, "height": 64}
    truth = theirs(diffusers_pipeline, request, **more)
    ours = pipeline.generate([request])[0]
    assert psnr(ours, truth, 255) >= 50
