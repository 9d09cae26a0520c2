"""Colours of latents, and fewer of them."""

from __future__ import annotations

import pytest
import torch

from zimage_lite.model.preview import latent_rgb, reduced
from zimage_lite.model.vae import to_pixels


def test_colours_of_latents() -> None:
    """Nothing is the grey of ComfyUI's bias; the fifth channel adds (0.0859, 0.0721, 0.0329), the last takes away."""
    x0 = torch.zeros(16, 2, 3)
    x0[4, 0, 1] = 5.0
    x0[15, 1, 2] = -100.0
    picture = latent_rgb(x0)
    assert picture.dtype == torch.uint8 and picture.shape == (2, 3, 3)
    assert picture[0, 0].tolist() == [round((1 + v) * 127.5) for v in (-0.0329, -0.0718, -0.0851)]
    assert picture[0, 1].tolist() == [round((1 + v) * 127.5) for v in (-0.0329 + 0.4295, -0.0718 + 0.3605, 0.0794)]
    assert picture[1, 2].tolist() == [255, 255, 255]


def test_every_channel_counts() -> None:
    grey = latent_rgb(torch.zeros(16, 1, 1))
    for channel in range(16):
        x0 = torch.zeros(16, 1, 1)
        x0[channel] = 8.0
        assert not torch.equal(latent_rgb(x0), grey), channel


def test_layers() -> None:
    """Against torch's own modules."""
    net = torch.nn.Sequential(torch.nn.Conv2d(16, 5, 1), torch.nn.ReLU(), torch.nn.Conv2d(5, 3, 1))
    layers = [torch.cat([c.weight.flatten(1), c.bias[:, None]], 1).tolist() for c in (net[0], net[2])]
    x0 = torch.randn(16, 4, 6)
    wanted = to_pixels(net(x0[None])[0].detach())
    assert (latent_rgb(x0, layers).int() - wanted.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("size", "wanted"), [((64, 64), (64, 64)), ((128, 128), (64, 64)), ((96, 200), (31, 64)), ((1000, 2), (64, 1))]
)
def test_neither_side_is_longer(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    x0 = torch.randn(16, *size)
    less = reduced(x0, 64)
    assert less.shape == (16, *wanted)
    assert torch.equal(less, x0) == (size == wanted)


def test_it_is_the_average() -> None:
    x0 = torch.randn(16, 128, 64)
    wanted = x0.view(16, 64, 2, 32, 2).mean((2, 4))
    torch.testing.assert_close(reduced(x0, 64), wanted, rtol=0, atol=1e-6)
