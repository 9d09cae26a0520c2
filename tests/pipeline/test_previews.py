"""Previews look like what will be drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import randomize
from safetensors.torch import save_file

from zimage_lite.checkpoint.model_card import DEMO, model_folder
from zimage_lite.checkpoint.model_files import ModelFiles, open_model
from zimage_lite.config import RuntimeOptions
from zimage_lite.errors import UserError
from zimage_lite.model.preview import latent_rgb
from zimage_lite.model.vae import to_pixels
from zimage_lite.pipeline import previews
from zimage_lite.pipeline.drawing import Pipeline
from zimage_lite.pipeline.previews import previewer


@pytest.fixture(scope="module")
def demo() -> ModelFiles:
    return open_model(model_folder(DEMO))


def test_the_demo_previews_what_it_draws(demo: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last step's guess, which is the final latent, its own decoder makes the very picture."""
    from zimage_lite import GenerateOptions
    from zimage_lite.pipeline.decode import Decode

    latents: list[torch.Tensor] = []
    decode = Decode.run
    monkeypatch.setattr(
        Decode, "run", lambda self, given, done, plan: (latents.extend(given), decode(self, given, done, plan))[1]
    )
    request = GenerateOptions("a red circle on a blue background", seed=3)
    (picture,) = Pipeline(demo, RuntimeOptions(device="cpu", dtype="fp32")).generate([request])
    preview = previewer(demo)(latents[0])
    assert preview.dtype == torch.uint8 and preview.shape == picture.shape
    assert (preview.int() - picture.int()).abs().max() <= 1


def test_a_large_autoencoder_is_not_run(demo: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(previews, "SMALL_BYTES", demo.vae.nbytes - 1)
    x0 = torch.randn(16, 12, 8)
    assert torch.equal(previewer(demo)(x0), latent_rgb(x0))


def test_taef1_where_it_is_given(demo: ModelFiles, tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    theirs: Any = AutoencoderTiny(latent_channels=16, scaling_factor=1.0, shift_factor=0.0).eval()
    randomize(theirs)
    save_file(theirs.state_dict(), tmp_path / "taef1.safetensors")
    preview = previewer(demo, tmp_path / "taef1.safetensors")
    x0 = torch.randn(16, 6, 10)
    with torch.inference_mode():
        wanted = to_pixels(theirs.decode(x0[None]).sample[0])
    assert (preview(x0).int() - wanted.int()).abs().max() <= 1
    assert preview(torch.randn(16, 12, 160)).shape == (40, 512, 3)  # of 64 latent pixels
    with pytest.raises(UserError, match="no tiny decoder"):
        previewer(demo, next((model_folder(DEMO) / "vae").glob("*.safetensors")))
