"""One ComfyUI for all tests that ask it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_server import NODES, Comfy, running

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="session")
def comfy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a LoRA for the demo among its models."""
    if not os.environ.get("COMFYUI"):
        pytest.skip("COMFYUI does not name a folder of ComfyUI")
    base = tmp_path_factory.mktemp("comfyui")
    for name in ("loras", "diffusion_models", "text_encoders", "vae", "model_patches", "zimage_lite"):
        (base / "models" / name).mkdir(parents=True)
    (base / "models" / "loras" / "hourglass.safetensors").symlink_to(DATA / "hourglass_lora.safetensors")
    return base


@pytest.fixture(scope="session")
def comfy(comfy_folder: Path) -> Iterator[Comfy]:
    nodes = {"zimage-lite": NODES, "tests": Path(__file__).parents[1] / "helpers" / "comfy_test_nodes"}
    if gguf := os.environ.get("COMFYUI_GGUF"):
        nodes["ComfyUI-GGUF"] = Path(gguf)
    with running(comfy_folder, nodes) as server:
        yield server
