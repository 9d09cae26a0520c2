"""Shared fixtures: tiny models that diffusers and transformers themselves made and saved."""

from __future__ import annotations

import os
import re

# Before torch: threads that spin while they wait made these tests 15 times slower beside another program on two cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:  # they share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // workers, 1)))
os.environ["ZIMAGE_LITE_CACHE"] = "off"  # no test touches the user's, and none profits from another's prompts

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported: its kernels then run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

import held_files
import quick_interpreter
from make_checkpoint import make_checkpoint
from omni_models import omni_pipeline
from oracles import randomize

from zimage_lite.cli import run

held_files.install()  # half of those who use this are on Windows, and none of those who test it
if os.environ.get("TRITON_INTERPRET") == "1":
    quick_interpreter.install()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-full-size", action="store_true", help="run tests that take minutes or gigabytes")


_SLOW_AS_A_WHOLE = re.compile(r"^pytestmark = (?:\[[^]]*?)?pytest\.mark\.slow\b", re.MULTILINE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The fast part does not even import files that are slow as a whole, nor the libraries that only they want."""
    if config.option.markexpr == "not slow" and collection_path.suffix == ".py":
        return bool(_SLOW_AS_A_WHOLE.search(collection_path.read_text(encoding="utf-8"))) or None
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip_full_size = pytest.mark.skip(reason="minutes or gigabytes; run with --run-full-size")
    skip_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("full_size") and not config.getoption("--run-full-size"):
            item.add_marker(skip_full_size)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
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
def pupil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that learns in no time."""
    from lessons import write_small

    return write_small(tmp_path_factory.mktemp("models") / "pupil")


@pytest.fixture(scope="session")
def lessons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with captions, to learn from."""
    from lessons import write_lessons

    return write_lessons(tmp_path_factory.mktemp("lessons"))


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


@pytest.fixture(scope="session")
def omni(diffusers_pipeline: Any) -> Any:
    """A ZImageOmniPipeline, as `diffusers_pipeline`."""
    return omni_pipeline(diffusers_pipeline)


@pytest.fixture(scope="session")
def omni_folder(omni: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `save_pretrained` makes of it."""
    folder = tmp_path_factory.mktemp("models") / "omni"
    omni.save_pretrained(folder)
    return folder


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


@pytest.fixture(scope="session")
def quanto_without_a_compiler() -> None:
    """quanto unpacks 2 and 4 bits by an extension, which a fresh installation would compile first, for 80 seconds."""
    from optimum.quanto.library.extensions import cpp

    def unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
        """uint8 codes of so many bits, the lowest first, one part of the rows after another: as quanto packs them."""
        return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])

    cpp.ext._lib = SimpleNamespace(unpack=unpacked)
