"""The norms that DoRA divides by are those of the weights as they are stored, in whatever format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapted import set_of
from safetensors.torch import save_file

from zimage_lite import quantize
from zimage_lite.adapters import updates
from zimage_lite.adapters.reading import open_adapter
from zimage_lite.adapters.updates import Dora
from zimage_lite.checkpoint.model_files import open_model

QKV = [f"layers.1.attention.to_{x}" for x in "qkv"]


@pytest.mark.slow
@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("weight_format", ["bf16", "q8_0", "int8", "nf4"])
def test_norms_of_any_format(
    tiny: Path, weight_format: str, by_column: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of fused q, k and v, in pieces that reach across them."""
    quantize(tiny, tmp_path / "model", weight_format)
    checkpoint = open_model(tmp_path / "model").transformer
    weights = [checkpoint.tensors[f"{module}.weight"].read().dequantize() for module in QKV]
    whole = torch.cat(weights).double()
    a, b = torch.randn(4, whole.shape[1]), torch.randn(len(whole), 4) * 0.05
    magnitude = torch.rand((1, whole.shape[1]) if by_column else (len(whole), 1)) + 0.5
    name = "layers.1.attention.qkv"
    save_file(
        {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b, f"{name}.dora_scale": magnitude},
        tmp_path / "dora.safetensors",
    )
    monkeypatch.setattr(updates, "PIECE_ROWS", len(weights[0]) * 3 // 4)
    adapter = open_adapter(tmp_path / "dora.safetensors", checkpoint.config)
    set_of((adapter, 1.0)).measure(checkpoint.tensors)
    norms = (whole + b.double() @ a.double()).norm(dim=0 if by_column else 1)
    assert len(adapter.applied) == 3
    for one in adapter.applied:
        assert isinstance(one.update, Dora) and one.update.norm is not None
        assert ((one.update.norm - norms).abs() <= 1e-5 * norms).all()
