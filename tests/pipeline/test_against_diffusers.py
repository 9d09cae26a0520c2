"""The same weights give the same numbers as diffusers and transformers, part by part and as a whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import PROMPT, bound, psnr, relative_error, run_transformer, transformer_inputs

from zimage_lite.checkpoint.model_files import open_model
from zimage_lite.config import GenerateOptions, RuntimeOptions
from zimage_lite.model.vae import Decoder, Encoder
from zimage_lite.pipeline.drawing import Pipeline

LONG_PROMPT = "a very long description of a red circle, " * 40  # more than 512 tokens


@pytest.fixture(scope="module")
def pipeline(diffusers_folder: Path) -> Pipeline:
    return Pipeline(open_model(diffusers_folder), RuntimeOptions(device="cpu"))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (26, 42)])
@pytest.mark.parametrize("tokens", [(1,), (9,), (64,), (20, 33)])
def test_transformer(diffusers_pipeline, diffusers_folder, pipeline, height, width, tokens) -> None:
    inputs = transformer_inputs(height, width, tokens)
    latents, features, t = inputs
    with torch.inference_mode():
        truth = diffusers_pipeline.transformer([x.unsqueeze(1) for x in latents], t.expand(len(tokens)), features)[0]
    ours = run_transformer(diffusers_folder, pipeline.model.transformer.config, inputs, torch.float32)
    for value, wanted in zip(ours, truth, strict=True):
        assert relative_error(value, wanted.squeeze(1)) <= 1e-5


@pytest.mark.slow
def test_transformer_in_bf16_is_as_exact_as_diffusers(diffusers_pipeline, diffusers_folder, pipeline) -> None:
    import copy

    inputs = transformer_inputs(32, 32, (40,))
    latents, features, t = inputs
    truth = run_transformer(diffusers_folder, pipeline.model.transformer.config, inputs, torch.float32)[0]
    half = copy.deepcopy(diffusers_pipeline.transformer).to(torch.bfloat16)
    with torch.inference_mode():
        theirs = half([latents[0].unsqueeze(1).bfloat16()], t, [features[0].bfloat16()])[0][0].squeeze(1)
    ours = run_transformer(diffusers_folder, pipeline.model.transformer.config, inputs, torch.bfloat16)[0]
    assert relative_error(ours, truth) <= 1.2 * relative_error(theirs, truth)


@pytest.mark.parametrize("prompt", ["", "cat", PROMPT, LONG_PROMPT])
def test_prompt_embedding(diffusers_pipeline, pipeline, prompt) -> None:
    with torch.inference_mode():
        truth = diffusers_pipeline._encode_prompt(prompt, device=torch.device("cpu"))[0]
        ours = pipeline.encode([prompt])[0]
    assert ours.shape == truth.shape
    assert relative_error(ours, truth) <= 1e-5


def test_prompts_encoded_together_equal_prompts_encoded_alone(pipeline) -> None:
    with torch.inference_mode():
        together = pipeline.encode(["cat", PROMPT, ""])
        alone = [pipeline.encode([prompt])[0] for prompt in ("cat", PROMPT, "")]
    for a, b in zip(together, alone, strict=True):
        assert relative_error(a, b) <= 1e-6  # the matrix product may split its sums differently


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(32, 32), (26, 42)])
def test_vae(diffusers_pipeline, diffusers_folder, pipeline, height, width) -> None:
    config, vae = pipeline.model.vae.config, diffusers_pipeline.vae
    modules = torch.nn.ModuleDict({"encoder": Encoder(config), "decoder": Decoder(config)})
    bound(modules, diffusers_folder / "vae")
    latent = torch.randn(16, height, width)
    image = torch.rand(3, 8 * height, 8 * width) * 2 - 1
    with torch.inference_mode():
        decoded = vae.decode((latent / config.scaling_factor + config.shift_factor).unsqueeze(0)).sample[0]
        encoded = vae.encode(image.unsqueeze(0)).latent_dist.parameters[0]
        assert relative_error(modules["decoder"](latent), decoded) <= 1e-5
        assert relative_error(modules["encoder"](image), encoded) <= 1e-5


CASES = {
    "square": GenerateOptions(PROMPT, 256, 256, seed=3),
    "wide": GenerateOptions(PROMPT, 512, 256, seed=4),
    "odd": GenerateOptions(PROMPT, 336, 208, seed=5),
    "one word": GenerateOptions("cat", 256, 256, seed=6),
    "600 tokens": GenerateOptions(LONG_PROMPT, 256, 256, seed=7),
    "Chinese": GenerateOptions("蓝色背景上的红色圆形", 256, 256, seed=8),
    "guided": GenerateOptions(PROMPT, 256, 256, seed=9, guidance=4.0, negative="blurry, 模糊"),
}


def diffusers_image(diffusers_pipeline: Any, case: GenerateOptions) -> torch.Tensor:
    result = diffusers_pipeline(
        case.prompt,
        height=case.height,
        width=case.width,
        num_inference_steps=case.steps or 8,
        guidance_scale=case.guidance or 0.0,
        negative_prompt=case.negative if case.guidance else None,
        generator=torch.Generator("cpu").manual_seed(case.seed),
    )
    return torch.from_numpy(np.asarray(result.images[0]).copy())


SLOW = ("odd", "600 tokens", "guided")


@pytest.mark.parametrize(
    "name",
    ["square", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
    + [pytest.param(name, marks=pytest.mark.full_size) for name in ("wide", "one word", "Chinese")],
)
def test_whole_pipeline(diffusers_pipeline, pipeline, name) -> None:
    case = CASES[name]
    truth = diffusers_image(diffusers_pipeline, case)
    ours = pipeline.generate([case])[0]
    assert truth.float().std() > 1  # a flat picture would agree with anything
    assert psnr(ours, truth, 255) >= 50


@pytest.mark.slow
def test_several_images_are_those_of_consecutive_seeds(diffusers_pipeline, pipeline) -> None:
    base = GenerateOptions("cat", 128, 128)
    requests = [replace(base, seed=seed) for seed in (11, 12, 13)]
    for request, ours in zip(requests, pipeline.generate(requests), strict=True):
        assert psnr(ours, diffusers_image(diffusers_pipeline, request), 255) >= 50
