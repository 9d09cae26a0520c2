"""An Omni's transformer against diffusers', evaluation by evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omni_models import TOWER
from oracles import bound, relative_error

from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.model.compute import Compute
from zimage_lite.model.omni import OmniTransformer, Seen, Told

SIZES = [(8, 12), (18, 26), (16, 16)]  # of latents; the second's tokens are no multiple of 32
GRIDS = [(4, 6), (5, 7), (16, 16)]


@pytest.fixture(scope="module")
def ours(omni_folder: Path) -> OmniTransformer:
    folder = omni_folder / "transformer"
    return bound(OmniTransformer(open_checkpoint(folder).config), folder)  # type: ignore[return-value]


def told(references: int, lengths: tuple[int, ...], aligned: bool = False) -> Told:
    pairs = list(zip(SIZES, GRIDS, strict=True))[:references]
    seen = [Seen(torch.randn(16, *size), torch.randn(*grid, TOWER)) for size, grid in pairs]
    return Told([torch.randn(length, 128) for length in lengths], seen, aligned)


def theirs(omni: Any, latents: list[torch.Tensor], given: list[Told], time: float) -> list[torch.Tensor]:
    found = omni.transformer(
        [
            [*(own.latent.unsqueeze(1) for own in one.seen), latent.unsqueeze(1)]
            for latent, one in zip(latents, given, strict=True)
        ],
        torch.tensor([time]).expand(len(latents)),
        [list(one.segments) for one in given],
        siglip_feats=[[*(own.features for own in one.seen), None] if one.seen else None for one in given],
        image_noise_mask=[[0] * len(one.seen) + [1] for one in given],
        return_dict=False,
    )[0]
    return [answer.squeeze(1) for answer in found]


def run(model: OmniTransformer, latents: list[torch.Tensor], given: list[Told], time: float) -> list[torch.Tensor]:
    captions = model.refine_captions(given)
    (modulation,) = model.modulations(torch.tensor([time]), torch.float32)
    return model(latents, captions, modulation)


CASES = {
    "no reference": [told(0, (23,))],
    "one": [told(1, (5, 41, 2))],
    "two": [told(2, (5, 2, 33, 2))],
    "three, and segments of whole pages": [told(3, (32, 64, 32, 40, 2))],
    "both sides of guidance": [told(2, (5, 2, 33, 2)), told(2, (5, 2, 4, 2))],
}


@pytest.mark.parametrize("size", [(16, 16), (10, 26)])
@pytest.mark.parametrize("given", CASES.values(), ids=list(CASES))
@torch.inference_mode()
def test_evaluation(omni: Any, ours: OmniTransformer, given: list[Told], size: tuple[int, int]) -> None:
    latents = [torch.randn(16, *size) for _ in given]
    pairs = zip(run(ours, latents, given, 0.3), theirs(omni, latents, given, 0.3), strict=True)
    assert all(relative_error(*pair) <= 1e-5 for pair in pairs)


@torch.inference_mode()
def test_aligned_ids_are_those_of_diffusers_with_its_defect_mended(
    omni: Any, ours: OmniTransformer, monkeypatch
) -> None:
    given, latents = [told(2, (5, 2, 33, 2), aligned=True)], [torch.randn(16, 16, 16)]
    plain = theirs(omni, latents, given, 0.3)[0]
    pad_with_ids = type(omni.transformer)._pad_with_ids

    def mended(self: Any, feat: torch.Tensor, size: tuple, *rest: Any) -> Any:
        is_caption = size[1:] == (1, 1) and feat.shape[-1] == 128
        return pad_with_ids(self, feat, (len(feat), 1, 1) if is_caption else size, *rest)

    monkeypatch.setattr(type(omni.transformer), "_pad_with_ids", mended)
    wanted = theirs(omni, latents, given, 0.3)[0]
    found = run(ours, latents, given, 0.3)[0]
    assert relative_error(found, wanted) <= 1e-5
    assert relative_error(found, plain) > 1e-3


@torch.inference_mode()
def test_rows_of_runs_in_8_bits(ours: OmniTransformer, omni_folder: Path) -> None:
    """Each run's rows get scales of their own, so what is joined are codes and scales."""
    from zimage_kernels import Int8Rows

    from zimage_lite.model.transformer import by_runs

    def step(x: torch.Tensor, h: Any, vectors: Any) -> Any:
        return x, Int8Rows((x * vectors).to(torch.int8), x[:, 0])

    x = torch.arange(12.0).view(6, 2)
    _, h = by_runs(step, x, None, [(4, torch.tensor(1.0)), (2, torch.tensor(2.0))])
    assert h.codes.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [16, 18], [20, 22]]
    assert h.scale.tolist() == x[:, 0].tolist()
    assert Compute() == ours.compute
