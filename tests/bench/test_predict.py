"""README's table of tiers is what the planner says now."""

from __future__ import annotations

from pathlib import Path

import pytest

from zimage_lite.bench.predict import cell
from zimage_lite.bench.tiers import TIERS, Tier
from zimage_lite.plan.model_sizes import true_model
from zimage_lite.report.tiers import _predicted

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
FORMATS = ("int8", "int4", "q4_k_m")


@pytest.mark.parametrize("tier", TIERS.values(), ids=TIERS)
def test_the_first_table_of_the_readme(tier: Tier) -> None:
    cells = [_predicted(cell(true_model(name), name, tier.gpu, 1024, tier)) for name in FORMATS]
    row = f"| {' | '.join([tier.gpu_name, f'{tier.ram_bytes // 10**9} GB', *cells])} |"
    assert row in README.splitlines(), f"say this instead: {row}"
    assert "| card | RAM | " + " | ".join(f"`{name}`" for name in FORMATS) + " |" in README
