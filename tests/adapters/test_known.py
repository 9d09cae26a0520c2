"""Adapters that want other settings than the model's own."""

from __future__ import annotations

import re

import pytest

from zimage_lite.adapters.known import unlike
from zimage_lite.config import GenerateOptions, Lora

EIGHT = "alibaba-pai/Z-Image-Fun-Lora-Distill/Z-Image-Fun-Lora-Distill-8-Steps-2603.safetensors"


@pytest.mark.parametrize(
    ("path", "strength", "steps", "guidance", "said"),
    [
        (EIGHT, 0.8, 8, 0.0, ""),
        (
            EIGHT,
            0.8,
            30,
            4.0,
            "--steps 8, --guidance 0, strength 0.7 to 0.8; got --steps 30, --guidance 4, strength 0.8",
        ),
        (EIGHT, 1.0, 8, 0.0, "strength 1"),
        (EIGHT, -1.0, 30, 4.0, ""),  # takes it back
        (r"C:\loras\Z-Image-Fun-Lora-Distill-4-Steps.safetensors", 1.0, 8, 0.0, "--steps 4"),
        ("zimage_turbo_training_adapter_v2.safetensors", 1.0, 8, 0.0, "--steps 30, guidance"),
        ("style.safetensors", 3.0, 8, 0.0, ""),
    ],
)
def test_settings(path: str, strength: float, steps: int, guidance: float, said: str) -> None:
    found = unlike(Lora(path, strength), GenerateOptions(steps=steps, guidance=guidance))
    assert (said in found) if said and found else found is None and not said
    if found:
        assert re.split(r"[/\\]", path)[-1] == found.partition(" is made for ")[0]
