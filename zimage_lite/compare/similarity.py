"""How alike two pictures of the same prompt and seed are: PSNR, SSIM, and LPIPS where its package is installed.

All of them on pictures as they are saved, 8 bits a colour. PSNR says how large the differences are, SSIM (Wang et al.
2004) whether the same edges are in the same places, LPIPS (Zhang et al. 2018) how different people find them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.util import find_spec

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import conv2d

from .likeness import IDENTICAL_DB

_MOST = 255
# As in Wang et al. 2004: windows of 11x11 with Gaussian weights, and two constants that keep flat areas finite.
_WINDOW, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03
_LPIPS_SIDE = 32  # pixels; of less, nothing is left after AlexNet's second pooling

Distance = Callable[[Tensor, Tensor], float]


def pixels(picture: Image.Image) -> Tensor:
    """-> [height, width, 3] uint8"""
    return torch.from_numpy(np.array(picture.convert("RGB")))


def psnr_db(a: Tensor, b: Tensor) -> float:
    """a, b: [height, width, 3] uint8. -> peak signal-to-noise ratio; IDENTICAL_DB for the same picture twice."""
    error = float((a.double() - b.double()).square().mean())
    return min(10 * math.log10(_MOST**2 / error), IDENTICAL_DB) if error else IDENTICAL_DB


def ssim(a: Tensor, b: Tensor) -> float:
    """a, b: [height, width, 3] uint8, at least 11 pixels each way. -> mean structural similarity over all windows that
    lie inside the picture, and over the three colours; 1 for the same picture twice."""
    return sum(_ssim(a[..., colour].double(), b[..., colour].double()) for colour in range(3)) / 3


def _ssim(x: Tensor, y: Tensor) -> float:
    """x, y: [height, width] float64: in float32, E[x^2] - E[x]^2 of a flat white area is off by up to 0.01."""
    steps = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    weights = torch.exp(-0.5 * (steps / _SIGMA) ** 2)
    weights /= weights.sum()

    def local(values: Tensor) -> Tensor:
        rows = conv2d(values[None, None], weights.view(1, 1, -1, 1))
        return conv2d(rows, weights.view(1, 1, 1, -1))[0, 0]

    mean_x, mean_y = local(x), local(y)
    both, square = mean_x * mean_y, mean_x.square() + mean_y.square()
    shared = local(x * y) - both
    spread = local(x.square() + y.square()) - square
    c1, c2 = (_K1 * _MOST) ** 2, (_K2 * _MOST) ** 2
    return float(((2 * both + c1) * (2 * shared + c2) / ((square + c1) * (spread + c2))).mean())


def open_lpips() -> tuple[Distance | None, str]:
    """-> the distance of two pictures [height, width, 3] uint8, at least 32 pixels each way, and what it is called; or
    None, and why there is none."""
    if not find_spec("lpips"):
        return None, "its package is not installed (pip install lpips)"
    try:
        with redirect_stdout(sys.stderr):  # stdout belongs to --json
            import lpips

            network = lpips.LPIPS(net="alex", verbose=False).eval()
    # A torchvision that is missing or made for another torch, or AlexNet's weights, which it fetches the first time.
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"its network cannot be loaded ({' '.join(str(error).split())[:100]})"

    @torch.inference_mode()
    def distance(a: Tensor, b: Tensor) -> float:
        return float(network(_signed(a), _signed(b)))

    return distance, "AlexNet"


def large_enough_for_lpips(width: int, height: int) -> bool:
    return min(width, height) >= _LPIPS_SIDE


def _signed(picture: Tensor) -> Tensor:
    """[height, width, 3] uint8 -> [1, 3, height, width] float32 from -1 to 1."""
    return picture.permute(2, 0, 1)[None].float() / (_MOST / 2) - 1
