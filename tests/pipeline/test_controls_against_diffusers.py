"""Pictures drawn with ControlNets: by diffusers' own rules the same as its pipelines, by the authors' the same as what
hooks make of those."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from controls import KINDS, SCALE, as_authors, make_control, save_control
from oracles import PROMPT, psnr
from picture_files import hole, smooth
from torch import Tensor

from zimage_lite.checkpoint.model_files import open_model
from zimage_lite.config import GenerateOptions, RuntimeOptions
from zimage_lite.pipeline.drawing import Pipeline

GUIDED = {"guidance": 3.0, "negative": "blurry"}
CASES = {"small": ((96, 64), {}), "guided": ((208, 80), GUIDED)}  # the second has 65 tokens
SLOW = pytest.mark.slow  # each picture twice


@pytest.fixture(scope="module")
def pipeline(diffusers_folder: Path) -> Pipeline:
    return Pipeline(open_model(diffusers_folder), RuntimeOptions(device="cpu", cache=False))


@pytest.fixture(scope="module")
def saved(diffusers_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """Version -> diffusers' ControlNet, and a folder of it."""
    found: dict[str, tuple[Any, Path]] = {}

    def of(version: str) -> tuple[Any, Path]:
        if version not in found:
            theirs = make_control(diffusers_pipeline.transformer, version)
            found[version] = theirs, save_control(theirs, tmp_path_factory.mktemp("controls") / version)
        return found[version]

    return of


def asked(size: tuple[int, int], folder: Path, **more: Any) -> GenerateOptions:
    """The hint has half of the image's size."""
    hint = smooth((size[0] // 2, size[1] // 2), 1)
    return GenerateOptions(PROMPT, *size, steps=3, seed=3, controls=f"{folder}:{SCALE}", control_image=hint, **more)


def theirs(pipeline: Any, request: GenerateOptions, **more: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        request.prompt,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance or 0.0,
        negative_prompt=request.negative if request.guidance else None,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        control_image=request.control_image[0],
        controlnet_conditioning_scale=SCALE,
        width=request.width,
        height=request.height,
        **more,
    )
    return torch.from_numpy(np.asarray(result.images[0]).copy())


def same(ours: Tensor, truth: Tensor) -> None:
    assert truth.float().std() > 1
    assert psnr(ours, truth, 255) >= 50


@pytest.mark.slow
@pytest.mark.parametrize("case", ["small", pytest.param("guided", marks=SLOW)])
@pytest.mark.parametrize("version", ["1.0", "2.1", *(pytest.param(one, marks=SLOW) for one in ("2.0", "2.1 lite"))])
def test_a_hint_is_followed(diffusers_pipeline, saved, pipeline, version, case) -> None:
    from diffusers import ZImageControlNetPipeline

    (net, folder), (size, more) = saved(version), CASES[case]
    request = asked(size, folder, control_math="diffusers", **more)
    truth = theirs(ZImageControlNetPipeline(**diffusers_pipeline.components, controlnet=net), request)
    same(pipeline.generate([request])[0], truth)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["small", pytest.param("guided", marks=[SLOW, pytest.mark.full_size])])
@pytest.mark.parametrize("version", ["2.1", *(pytest.param(one, marks=SLOW) for one in ("2.0", "2.1 lite"))])
def test_a_hint_and_a_mask(diffusers_pipeline, saved, pipeline, version, case) -> None:
    from diffusers import ZImageControlNetInpaintPipeline

    (net, folder), (size, more) = saved(version), CASES[case]
    image, mask = smooth(size, 2), hole(size)
    request = asked(size, folder, image=image, mask=mask, control_math="diffusers", **more)
    parts = ZImageControlNetInpaintPipeline(**diffusers_pipeline.components, controlnet=net)
    truth = theirs(parts, request, image=image, mask_image=mask)
    ours = pipeline.generate([request])[0]
    same(ours, truth)
    plain = pipeline.generate([asked(size, folder, control_math="diffusers", **more)])[0]
    assert psnr(plain, ours, 255) < 40  # what the mask shows is seen


@SLOW
@pytest.mark.parametrize("version", KINDS)
def test_the_authors_mathematics(diffusers_pipeline, saved, pipeline, version) -> None:
    """Hints of the refiner reach the transformer, too."""
    from diffusers import ZImageControlNetPipeline

    (net, folder), (size, more) = saved(version), CASES["guided"]
    request = asked(size, folder, **more)
    made = ZImageControlNetPipeline(**diffusers_pipeline.components, controlnet=net)
    with as_authors(diffusers_pipeline.transformer, net):
        truth = theirs(made, request)
    same(pipeline.generate([request])[0], truth)
