"""The demo twice: as diffusers loads it, and in diffusers' pipelines with our models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from zimage_lite.checkpoint.model_card import DEMO, model_folder


@pytest.fixture(scope="session")
def theirs() -> Any:
    """In float32."""
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.ZImagePipeline.from_pretrained(model_folder(DEMO), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def opened() -> Any:
    pytest.importorskip("diffusers")
    from zimage_lite.diffusers import load_pipeline

    pipe = load_pipeline(DEMO, device="cpu", cache=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def ours(opened: Any) -> Any:
    """As if it was just opened."""
    scheduler = opened.scheduler
    yield opened
    opened.scheduler = scheduler
    opened.unload_lora_weights()
    opened.transformer.ours.close()


@pytest.fixture(scope="session")
def controls(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A ControlNet for the demo: diffusers' own, and a folder of it."""
    from controls import make_control, save_control

    made = make_control(theirs.transformer, "2.1")
    return made, save_control(made, tmp_path_factory.mktemp("controls") / "2.1")


@pytest.fixture
def draw() -> Callable[..., torch.Tensor]:
    """What a pipeline draws of the demo's prompt: [height, width, 3] float32 in [0, 1]."""

    def drawn(pipe: Any, **more: Any) -> torch.Tensor:
        asked = {
            "prompt": "a red circle on a blue background",
            "height": 64,
            "width": 64,
            "num_inference_steps": 2,
            "max_sequence_length": 64,  # theirs pads to it
            "guidance_scale": 0.0,
            "generator": torch.Generator("cpu").manual_seed(42),
            "output_type": "np",
            **more,
        }
        return torch.from_numpy(pipe(**asked).images)

    return drawn
