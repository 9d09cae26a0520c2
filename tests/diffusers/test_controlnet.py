"""ControlNets in diffusers' pipelines: ours run beside the transformer; diffusers' own cannot, and say so."""

from __future__ import annotations

import pytest
import torch
from picture_files import smooth

from zimage_lite.errors import UserError

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.slow  # loads diffusers, which takes seconds


def test_those_of_diffusers_are_refused(ours, controls, draw) -> None:
    net = diffusers.ZImageControlNetModel.from_config(controls[0].config)
    pipe = diffusers.ZImageControlNetPipeline.from_pipe(ours, controlnet=net)
    with pytest.raises(UserError, match="load_controlnet"):
        draw(pipe, control_image=smooth((64, 64)))


def test_what_cannot_be_is_refused_by_name(ours, controls) -> None:
    from zimage_lite.diffusers import load_controlnet

    net = load_controlnet(controls[1])
    latents, t, features = [torch.zeros(16, 1, 8, 8)], torch.ones(1), [torch.zeros(3, 256)]
    context = torch.zeros(1, net.config.control_in_dim, 1, 8, 8)
    with pytest.raises(UserError, match="patch sizes"):
        net(latents, t, features, context, patch_size=4)
    with pytest.raises(UserError, match="scale"):
        net(latents, t, features, context, conditioning_scale=-1.0)
    hints = net(latents, t, features, context)
    ours.transformer(latents, t, features, controlnet_block_samples=hints)
    with pytest.raises(UserError, match="other latents"):
        ours.transformer([latents[0] + 1], t, features, controlnet_block_samples=hints)
    ours.transformer.ours.close()


def test_a_file_that_is_none() -> None:
    from zimage_lite.checkpoint.model_card import DEMO, model_folder
    from zimage_lite.diffusers import load_controlnet

    with pytest.raises(UserError, match="transformer"):
        load_controlnet(model_folder(DEMO) / "transformer")
