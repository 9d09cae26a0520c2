"""Figures of likeness against scikit-image and by hand."""

from __future__ import annotations

import pytest
import torch

from zimage_lite.compare.likeness import said
from zimage_lite.compare.similarity import psnr_db, ssim


def noisy(height: int, width: int, deviation: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture with edges and flat areas, the brightest ones included, and the same with noise."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    clean = torch.stack([(x > width // 2) * 255.0, (x + y) / (height + width) * 200, 255.0 * (y < height // 3)], dim=-1)
    spoilt = clean + deviation * torch.randn(height, width, 3)
    return clean.to(torch.uint8), spoilt.clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("deviation", [0.7, 20.0, 300.0])
@pytest.mark.parametrize("size", [(64, 64), (16, 48), (33, 11)])
def test_figures_are_those_of_scikit_image(size: tuple[int, int], deviation: float) -> None:
    """Both in float64, with the windows and constants of Wang et al.: they differ by the order of sums."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity  # seconds, for collecting, too

    a, b = noisy(*size, deviation)
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "K1": 0.01, "K2": 0.03}
    theirs = structural_similarity(a.numpy(), b.numpy(), channel_axis=2, data_range=255, **wang)
    assert ssim(a, b) == pytest.approx(theirs, abs=1e-10)
    assert psnr_db(a, b) == pytest.approx(peak_signal_noise_ratio(a.numpy(), b.numpy()), abs=1e-10)


def test_figures_by_hand() -> None:
    """A grey picture and one that is a step brighter: 20 log10(255), and SSIM's first factor alone."""
    a = torch.full((16, 16, 3), 100, dtype=torch.uint8)
    assert psnr_db(a, a + 1) == pytest.approx(48.1308, abs=1e-4)
    c1 = 2.55**2
    assert ssim(a, a + 1) == pytest.approx((2 * 100 * 101 + c1) / (100**2 + 101**2 + c1), abs=1e-12)
    assert (psnr_db(a, a), ssim(a, a)) == (100.0, 1.0)
    assert (said("psnr_db", 100.0), said("psnr_db", 48.13), said("ssim", 1.0)) == ("identical", "48.1 dB", "1.0000")
