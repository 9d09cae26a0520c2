"""The vision tower against transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import bound, relative_error

from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.model.vision import VisionTower


@pytest.mark.parametrize("grids", [[(16, 16)], [(4, 4)], [(2, 3), (1, 40), (7, 5)]])
@torch.inference_mode()
def test_features(omni: Any, omni_folder: Path, grids: list[tuple[int, int]]) -> None:
    folder = omni_folder / "siglip"
    ours = bound(VisionTower(open_checkpoint(folder).config), folder)
    patches = [torch.rand(rows * columns, 768) * 2 - 1 for rows, columns in grids]
    found = ours(patches, grids)
    for own, grid, features in zip(patches, grids, found, strict=True):
        padded = torch.cat([own, torch.zeros(256 - len(own), 768)])[None]
        mask = (torch.arange(256) < len(own)).int()[None]
        truth = omni.siglip(pixel_values=padded, pixel_attention_mask=mask, spatial_shapes=torch.tensor([grid]))
        assert features.shape == (*grid, 96)
        assert relative_error(features.flatten(0, 1), truth.last_hidden_state[0, : len(own)]) <= 1e-5
