"""Pictures that are drawn from pictures and words, against diffusers' ZImageOmniPipeline."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import PROMPT, psnr
from PIL import Image
from safetensors.torch import load_file, save_file

from zimage_lite import quantize
from zimage_lite.checkpoint.model_files import open_model
from zimage_lite.config import GenerateOptions, RuntimeOptions
from zimage_lite.memory.plan import FILE
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
def _float32_vae(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers hands its VAE bfloat16, which a VAE in float32 refuses."""
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


@pytest.mark.slow
@pytest.mark.parametrize("to", ["q8_0", "int8", "qint8", "bf16"])  # GGUF, ComfyUI's, diffusers' own, and not smaller
def test_picture_of_quantized_weights(omni: Any, omni_folder: Path, tmp_path: Path, to: str) -> None:
    """diffusers draws with what the weights are worth."""
    quantize(omni_folder, tmp_path / "model", to, text_encoder_to="keep")
    files = open_model(tmp_path / "model")
    values = {name: tensor.read().dequantize(torch.float32) for name, tensor in files.transformer.tensors.items()}
    assert any(name.startswith("siglip_refiner.") and name.endswith("w1.weight") for name in values)
    there = copy.copy(omni)
    there.transformer = copy.deepcopy(omni.transformer)
    there.transformer.load_state_dict(
        {name: values[name].view(weight.shape) for name, weight in omni.transformer.state_dict().items()}
    )
    case = GenerateOptions(PROMPT, 128, 160, steps=STEPS, seed=4, guidance=3.0, references=pictures(2))
    (found,) = Pipeline(files, RuntimeOptions(device="cpu", compute="16bit")).generate([case])
    assert psnr(found.float(), theirs(there, case), 255) >= 60
    (other,) = Pipeline(open_model(omni_folder), RuntimeOptions(device="cpu")).generate([case])
    assert not torch.equal(found, other)


@pytest.mark.slow
def test_layout_of_comfyui(omni: Any, omni_folder: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    """One file with fused names, a text encoder, a VAE and a tower in folders of ComfyUI's."""
    files, there = pipeline.model, tmp_path / "diffusion_models"
    there.mkdir()
    quantize(omni_folder / "transformer", there / "omni.safetensors", "fp8", keep=["*"])
    parts = ("text_encoder", "text_encoders", "model."), ("siglip", "clip_vision", "vision_model.")
    for component, folder, prefix in parts:
        (tmp_path / folder).mkdir()
        (file,) = (omni_folder / component).glob("*.safetensors")
        tensors = {f"{prefix}{name.removeprefix(prefix)}": tensor for name, tensor in load_file(file).items()}
        save_file(tensors, tmp_path / folder / "file.safetensors")
    (tmp_path / "vae").symlink_to(omni_folder / "vae")
    (tmp_path / "tokenizer").symlink_to(omni_folder / "tokenizer")
    found = open_model(tmp_path)
    assert found.transformer.layout.startswith("ComfyUI") and found.siglip and "vision_model." in found.siglip.layout
    assert found.transformer.config == files.transformer.config
    assert files.siglip and replace(found.siglip.config, num_attention_heads=2) == files.siglip.config  # no shape tells
    found = open_model(tmp_path, {"siglip": omni_folder / "siglip"})
    case = GenerateOptions(PROMPT, 128, 128, steps=STEPS, seed=4, references=pictures(1))
    (ours,), (same,) = Pipeline(found, RuntimeOptions(device="cpu")).generate([case]), pipeline.generate([case])
    assert psnr(ours.float(), same.float(), 255) >= 40  # of weights in bf16


def test_budget_and_company_change_nothing(omni_folder: Path, pipeline: Pipeline) -> None:
    """Blocks that stream, and others that are drawn in the same round, give the same picture to the last bit or nearly;
    references that are seen twice are encoded once."""
    cases = [
        GenerateOptions(prompt, 128, 128, steps=2, seed=5, references=pictures(count))
        for prompt, count in ((PROMPT, 2), ("cat", 1), ("a longer prompt, of other words", 1), ("none", 0))
    ]
    alone = [pipeline.generate([case])[0] for case in cases]
    together = pipeline.generate(cases)
    phases = {plan.phase for plan in pipeline.planned([cases[0]])}
    assert phases == {"encode", "picture", "look", "denoise", "decode"}
    plan = pipeline.plans["denoise"]
    less = RuntimeOptions("cpu", ram_bytes=plan.peak_ram_bytes - sum(plan.sizes.values()) // 2)
    tight = Pipeline(pipeline.model, less)
    assert torch.equal(tight.generate([cases[0]])[0], alone[0])
    assert FILE in tight.plans["denoise"].homes.values()
    for found, wanted in zip(together, alone, strict=True):
        assert psnr(found.float(), wanted.float(), 255) >= 60


def test_aligned_positions_draw_another_picture(pipeline: Pipeline) -> None:
    case = GenerateOptions(PROMPT, 128, 128, steps=2, seed=5, references=pictures(2))
    plain, aligned = pipeline.generate([case, replace(case, reference_positions="aligned")])
    assert not torch.equal(plain, aligned)


def test_the_image_has_the_last_references_size_unless_one_is_named(pipeline: Pipeline) -> None:
    case = GenerateOptions(PROMPT, steps=1, references=pictures(2))
    sizes = [
        found.shape[:2]
        for found in pipeline.generate([case, replace(case, width=160), replace(case, width=64, height=80)])
    ]
    assert sizes == [(96, 256), (96, 160), (80, 64)]


def test_a_lora_reaches_the_siglip_refiner(omni: Any, pipeline: Pipeline, tmp_path: Path) -> None:
    """Beside the weights, as in them."""
    modules = (
        "siglip_refiner.0.attention.to_q",
        "siglip_refiner.1.feed_forward.w2",
        "siglip_embedder.1",
        "layers.0.attention.to_v",
    )
    there, tensors = copy.copy(omni), {}
    there.transformer = copy.deepcopy(omni.transformer)
    for module in modules:
        weight = there.transformer.get_submodule(module).weight
        down, up = torch.randn(4, weight.shape[1]) * weight.shape[1] ** -0.5, torch.randn(weight.shape[0], 4) * 0.3
        tensors |= {f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up}
        weight.data += 0.7 * up @ down
    save_file(tensors, tmp_path / "style.safetensors")
    case = GenerateOptions(PROMPT, 128, 128, steps=STEPS, seed=4, guidance=0.0, references=pictures(1))
    found, plain = pipeline.generate([replace(case, loras=[f"{tmp_path / 'style.safetensors'}:0.7"]), case])
    assert psnr(found.float(), theirs(there, case), 255) >= 60
    assert psnr(found.float(), plain.float(), 255) < 45
