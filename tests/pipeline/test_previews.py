"""Previews look like what will be drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import randomize
from safetensors.torch import save_file

from zimage_lite import GenerateOptions
from zimage_lite.checkpoint.model_card import CARD, DEMO, colour_layers, model_folder
from zimage_lite.checkpoint.model_files import ModelFiles, open_model
from zimage_lite.config import RuntimeOptions
from zimage_lite.errors import UserError
from zimage_lite.model.preview import FLUX, latent_rgb
from zimage_lite.model.vae import to_pixels
from zimage_lite.pipeline.decode import Decode
from zimage_lite.pipeline.drawing import Pipeline
from zimage_lite.pipeline.previews import previewer


@pytest.fixture(scope="module")
def demo() -> ModelFiles:
    return open_model(model_folder(DEMO))


PROMPTS = (
    "a red circle on a blue background",
    "a green triangle on a yellow background",
    "a purple star on a white background",
)


@pytest.mark.slow
def test_the_demo_previews_what_it_draws(demo: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last step's guess, which is the final latent, each pixel is about the mean of 8 x 8 drawn ones: off by
    2 to 6 % of white on average, and by 1 to 2 % in the top row, where nothing but the background is."""
    latents: list[torch.Tensor] = []
    decode = Decode.run

    def spy(self: Decode, given: list[torch.Tensor], *others: Any) -> Any:
        latents.extend(given)
        return decode(self, given, *others)

    monkeypatch.setattr(Decode, "run", spy)
    requests = [GenerateOptions(prompt, seed=3) for prompt in PROMPTS]
    pictures = Pipeline(demo, RuntimeOptions(device="cpu", dtype="fp32")).generate(requests)
    for latent, picture in zip(latents, pictures, strict=True):
        preview = previewer(demo)(latent)
        assert preview.dtype == torch.uint8 and preview.shape == (8, 8, 3)
        wanted = F.avg_pool2d(picture.permute(2, 0, 1).float(), 8).permute(1, 2, 0)
        error = (preview.float() - wanted).abs()
        assert error.mean() < 0.09 * 255
        assert error[0].mean() < 0.04 * 255


def test_other_models_have_the_colours_of_flux(tiny: Path) -> None:
    model, x0 = open_model(tiny), torch.randn(16, 12, 8)
    assert model.colours is None
    assert torch.equal(previewer(model)(x0), latent_rgb(x0, FLUX))


@pytest.mark.parametrize(
    ("colours", "message"),
    [
        ("red", "not lists of rows"),
        ([["0.5 x"]], "not lists of rows"),
        ([[0.5]], "not lists of rows"),
        ([["1 2 3"] * 3], "16 weights and a bias"),
        ([[" 1" * 17] * 2], "got 2, expected 3"),
        ([], "got 16, expected 3"),
    ],
)
def test_a_card_that_is_wrong(tmp_path: Path, colours: object, message: str) -> None:
    (tmp_path / CARD).write_text(json.dumps({"colours": colours}))
    with pytest.raises(UserError, match=message):
        colour_layers(tmp_path)


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
    assert preview(torch.randn(16, 12, 160)).shape == (16, 256, 3)  # of 32 latent pixels
    with pytest.raises(UserError, match="no tiny decoder"):
        previewer(demo, next((model_folder(DEMO) / "vae").glob("*.safetensors")))
