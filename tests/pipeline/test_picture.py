"""Pictures to start from: the same latents as diffusers', within any budget, from every VAE that has an encoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from make_checkpoint import make_checkpoint
from oracles import psnr, relative_error
from torch import Tensor

from zimage_lite.checkpoint.checkpoint import Checkpoint
from zimage_lite.checkpoint.model_card import DEMO, model_folder
from zimage_lite.checkpoint.model_files import open_model
from zimage_lite.cli import run
from zimage_lite.config import RuntimeOptions
from zimage_lite.convert.synthetic import open_synthetic
from zimage_lite.errors import BudgetError, UserError
from zimage_lite.memory import hardware
from zimage_lite.pipeline import picture as encoding
from zimage_lite.pipeline.drawing import Pipeline
from zimage_lite.plan.job import Job

SIZES = ((64, 64), (48, 112), (208, 80))  # height, width


def picture_of(height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    smooth = torch.stack([rows, columns, (rows + columns) / 2], 2) * 200
    return (smooth + torch.rand(height, width, 3, generator=generator) * 55).to(torch.uint8)


@pytest.fixture
def pipeline(diffusers_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    monkeypatch.setattr(hardware, "rss_bytes", lambda: 0)
    return Pipeline(open_model(diffusers_folder), RuntimeOptions(device="cpu", dtype="fp32"))


def encoded(pipeline: Pipeline, pictures: list[Tensor], noises: list[Tensor | None]) -> list[Tensor]:
    """As `Pipeline.encode_pictures`, with noise."""
    phase, job = pipeline.encoding_pictures, Job(pictures[0].shape[1], pictures[0].shape[0], pictures=len(pictures))
    (ways,) = pipeline.work.planning.planned([phase.ways(job)])
    with torch.inference_mode():
        return list(phase.run(pictures, noises, 0, ways.plan))


def posterior(vae: Any, picture: Tensor) -> Any:
    """As diffusers makes it of an image that is given to a pipeline."""
    from diffusers.image_processor import VaeImageProcessor
    from PIL import Image

    image = VaeImageProcessor(vae_scale_factor=16).preprocess(Image.fromarray(picture.numpy()))
    with torch.inference_mode():
        return vae.encode(image).latent_dist


def scaled(latent: Tensor) -> Tensor:
    return (latent - 0.1159) * 0.3611


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_latents_are_those_of_diffusers(height: int, width: int, pipeline: Pipeline, diffusers_pipeline: Any) -> None:
    """The most likely one, and the one that diffusers draws with the generator that gave the noise."""
    picture, shape = picture_of(height, width), (16, height // 8, width // 8)
    theirs = posterior(diffusers_pipeline.vae, picture)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))[0]
    mean, sample = encoded(pipeline, [picture, picture], [None, noise])
    assert mean.shape == shape and mean.dtype == torch.float32 and mean.device.type == "cpu"
    assert relative_error(mean, scaled(theirs.mode()[0])) <= 1e-5
    assert relative_error(sample, scaled(theirs.sample(torch.Generator().manual_seed(3))[0])) <= 1e-5
    assert relative_error(sample, mean) > 0.1
    assert torch.equal(pipeline.encode_pictures([picture])[0], mean)


def test_several_pictures_one_after_another(pipeline: Pipeline) -> None:
    """Each as if it were alone; from `done` on after memory ran out."""
    pictures = [picture_of(64, 96, seed) for seed in range(3)]
    alone = [pipeline.encode_pictures([picture])[0] for picture in pictures]
    assert all(map(torch.equal, pipeline.encode_pictures(pictures), alone))
    plan = pipeline.plans["picture"]
    assert plan.passes == 3 and pipeline.meter.phases["picture"]["seconds"] > 0
    with torch.inference_mode():
        rest = list(pipeline.encoding_pictures.run(pictures, [None] * 3, 2, plan))
    assert len(rest) == 1 and torch.equal(rest[0], alone[2])


@pytest.mark.slow
def test_latents_do_not_depend_on_the_budget(pipeline: Pipeline) -> None:
    """From the whole picture at once to the smallest bands; less than that is refused."""
    picture = picture_of(208, 272)
    truth = pipeline.encode_pictures([picture])[0]
    ways = [pipeline.plans["picture"].way]
    with pytest.raises(BudgetError, match="picture"):
        while True:
            budget = pipeline.plans["picture"].peak_ram_bytes - 1
            pipeline.work.options = replace(pipeline.options, ram_bytes=budget)
            latent = pipeline.encode_pictures([picture])[0]
            assert (latent - truth).abs().max() <= 5e-6 * (truth.max() - truth.min())  # as in model/test_banded.py
            assert pipeline.plans["picture"].peak_ram_bytes <= budget
            ways.append(pipeline.plans["picture"].way)
    assert ways[0].rows_per_band == 0 and len(set(ways)) == len(ways) >= 3
    assert ways[-1].rows_per_band <= 4 and not ways[-1].store_hidden


def test_memory_that_runs_out_once(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done is kept, and the rest goes on in bands."""
    pictures, told = [picture_of(128, 128, seed) for seed in range(3)], list[str]()
    truths, whole, calls = pipeline.encode_pictures(pictures), encoding.encode_as_planned, list[Any]()

    def failing(encoder: Any, image: Tensor, plan: Any) -> Tensor:
        calls.append(plan)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return whole(encoder, image, plan)

    monkeypatch.setattr(encoding, "encode_as_planned", failing)
    pipeline.work.tell = told.append
    found = pipeline.encode_pictures(pictures)
    assert len(told) == 1 and told[0].startswith("picture: memory ran out")
    assert [plan.rows_per_band > 0 for plan in calls] == [False, False, True, True]
    for latent, truth in zip(found, truths, strict=True):
        assert (latent - truth).abs().max() <= 5e-6 * (truth.max() - truth.min())
    assert all(parameter.is_meta for parameter in pipeline.encoding_pictures.component.model.parameters())


# Where encoders come from


def test_the_demo_reads_its_own_pictures() -> None:
    """A picture, encoded and decoded, is that picture, about: 20 dB is an error of 26 of 255."""
    pipeline = Pipeline(open_model(model_folder(DEMO)), RuntimeOptions(device="cpu"))
    picture = torch.full((64, 64, 3), 255, dtype=torch.uint8)
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    picture[(rows - 32) ** 2 + (columns - 32) ** 2 < 300] = torch.tensor([200, 20, 20], dtype=torch.uint8)
    again = pipeline.decode(pipeline.encode_pictures([picture]))[0]
    assert psnr(again, picture, 255) > 20


def test_every_file_of_a_vae(tiny: Path, tmp_path: Path) -> None:
    """Flux's own, and what `quantize` carries over, give the latents of the folder that they were made of."""
    make_checkpoint(tmp_path / "comfyui", "tiny", layout="comfyui")
    assert run(["quantize", str(tiny), "--to", "q8_0", "-o", str(tmp_path / "q8_0")]) == 0
    models = (
        open_model(tiny),
        open_model(tmp_path / "comfyui"),
        open_model(tiny, {"vae": tmp_path / "comfyui" / "vae" / "ae.safetensors"}),
        open_model(tmp_path / "q8_0"),
    )
    first, *others = (Pipeline(m, RuntimeOptions("cpu")).encode_pictures([picture_of(48, 64)])[0] for m in models)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.slow
def test_a_synthetic_model_has_one() -> None:
    pipeline = Pipeline(open_synthetic("synthetic:q4_0"), RuntimeOptions("cpu"))
    assert pipeline.encode_pictures([picture_of(32, 32)])[0].isfinite().all()


def without(vae: Checkpoint, *beginnings: str) -> Checkpoint:
    return replace(vae, tensors={n: t for n, t in vae.tensors.items() if not n.startswith(beginnings)})


def test_a_vae_that_only_decodes(diffusers_folder: Path) -> None:
    """Draws, and says what it cannot do before anything is loaded."""
    files = open_model(diffusers_folder)
    pipeline = Pipeline(replace(files, vae=without(files.vae, "encoder.")), RuntimeOptions("cpu"))
    assert pipeline.decode([torch.zeros(16, 4, 4)])[0].shape == (32, 32, 3)
    with pytest.raises(UserError, match="a decoder and no encoder"):
        pipeline.encode_pictures([picture_of(32, 32)])
    pipeline = Pipeline(replace(files, vae=without(files.vae, "encoder.conv_in")), RuntimeOptions("cpu"))
    with pytest.raises(UserError, match=r"encoder\.conv_in\.weight and 1 more missing"):
        pipeline.encode_pictures([picture_of(32, 32)])
