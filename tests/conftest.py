"""Shared fixtures: tiny models that diffusers and transformers themselves made and saved."""

from __future__ import annotations

import os

# Before torch: threads that spin while they wait made these tests 15 times slower beside another program on two cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["ZIMAGE_LITE_CACHE"] = "off"  # no test touches the user's, and none profits from another's prompts

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported: its kernels then run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

from make_checkpoint import make_checkpoint

from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.cli import run
from zimage_lite.memory.hardware import Hardware
from zimage_lite.model.float16 import stream_dtype
from zimage_lite.model.linear import shapes
from zimage_lite.model.transformer import Transformer
from zimage_lite.pipeline.weights import read_into

PROMPT = "a red circle on a blue background, 你好"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run tests that take minutes or gigabytes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip_slow = pytest.mark.skip(reason="slow; run with --run-slow")
    skip_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--run-slow"):
            item.add_marker(skip_slow)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip_gpu)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder by our own tool, bf16: for everything that needs files but no oracle."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_checkpoint(folder, "tiny")
    return folder


@pytest.fixture(scope="session")
def diffusers_pipeline(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Any:
    """A ZImagePipeline of random float32 weights with realistic norms, its tokenizer from the tiny model."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

    torch.manual_seed(1)
    transformer = ZImageTransformer2DModel(
        dim=256, n_layers=3, n_refiner_layers=2, n_heads=2, n_kv_heads=2, cap_feat_dim=128, axes_lens=[1536, 512, 512]
    )
    encoder_config = Qwen3Config(
        vocab_size=320, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        intermediate_size=256, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    text_encoder = Qwen3Model(encoder_config)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=16, block_out_channels=(32, 32, 64, 64), layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, norm_num_groups=32,
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    for model in (transformer, text_encoder, vae):
        randomize(model)
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=False),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=AutoTokenizer.from_pretrained(tiny / "tokenizer"),
        transformer=transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def diffusers_folder(diffusers_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `save_pretrained` makes of it."""
    folder = tmp_path_factory.mktemp("models") / "diffusers"
    diffusers_pipeline.save_pretrained(folder)
    return folder


def randomize(model: torch.nn.Module) -> None:
    """Norms near one, linears and convolutions that keep the variance, everything else small but not zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.1)
            elif parameter.ndim >= 2 and "pad_token" not in name and "embed_tokens" not in name:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(0.0, 0.1)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line that must be refused: exit code 2, one line on stderr, no traceback. Returns the line.

    notes: lines that may come first."""

    def call(*args: object, code: int = 2, notes: int = 0) -> str:
        capsys.readouterr()
        assert run([str(arg) for arg in args]) == code
        captured = capsys.readouterr()
        lines = captured.err.strip().splitlines()
        assert all(line.startswith("note: ") for line in lines[:notes]), captured.err
        del lines[:notes]
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("error: ")
        assert captured.out == ""
        return lines[0]

    return call


def psnr(a: torch.Tensor, b: torch.Tensor, peak: float) -> float:
    """In decibels."""
    mse = (a.double() - b.double()).square().mean().item()
    return float("inf") if mse == 0 else 10 * torch.log10(torch.tensor(peak**2 / mse)).item()


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """||value - truth|| / ||truth||"""
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


def bound(module: torch.nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    checkpoint = open_checkpoint(folder).restricted_to(shapes(module))
    read_into(module, checkpoint.tensors, Hardware(torch.device("cpu"), dtype))
    return module


def run_transformer(folder: Path, config: Any, inputs: tuple, dtype: torch.dtype) -> list[torch.Tensor]:
    latents, features, t = inputs
    transformer = bound(Transformer(config), folder / "transformer", dtype)
    with torch.inference_mode():
        captions = transformer.refine_captions([feature.to(stream_dtype(dtype)) for feature in features])
        return transformer([latent.to(dtype) for latent in latents], captions, *transformer.modulations(t, dtype))


def transformer_inputs(height: int, width: int, tokens: tuple[int, ...]) -> tuple:
    generator = torch.Generator().manual_seed(5)
    latents = [torch.randn(16, height, width, generator=generator) for _ in tokens]
    features = [torch.randn(n, 128, generator=generator) for n in tokens]
    return latents, features, torch.tensor([0.3])
