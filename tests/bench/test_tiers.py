"""The tiers are what their names say."""

from __future__ import annotations

import pytest

from zimage_lite.bench.tiers import TIERS
from zimage_lite.plan.model_sizes import true_model


@pytest.mark.slow
def test_tiers_are_what_their_names_say() -> None:
    for name, tier in TIERS.items():
        assert name == f"{tier.gpu.vram_gib}gb" == tier.name and tier.vram_bytes < tier.gpu.vram_bytes
        assert {gpu.vram_gib for gpu in tier.gpus} == {tier.gpu.vram_gib} and len(set(tier.gpus)) == len(tier.gpus)
        for format_name in tier.formats:
            true_model(format_name)
