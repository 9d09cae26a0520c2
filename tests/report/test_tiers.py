"""Tables of tiers: what was measured beside what was predicted."""

from __future__ import annotations

import json
from typing import Any

import pytest
from result_pages import require_self_contained

from zimage_lite.bench.tiers import OOM
from zimage_lite.page.html import Figure, Table, as_html
from zimage_lite.report.sections import sections


def test_tier_beside_its_predictions(tier: dict[str, Any]) -> None:
    found = sections({"tier.json": tier})
    page = require_self_contained(as_html("t", found))
    table = next(part for part in found[0].parts if isinstance(part, Table))
    rows = {(row[0], row[1]): row for row in table.rows}
    measured = rows["H200, measured", "int8"]
    assert measured[3:7] == ["5.50 (5.00 to 6.00), cold 9.00", "2.79 GiB", "1.00 GB", "60% of a step"]
    assert rows["H200, measured", "bf16"][7] == "out of memory: 2 GB more than there is"
    fast, slow = tier["cells"][0]["seconds"]["range"]
    assert rows["RTX 3050 Laptop 4GB, predicted", "int8"][3] == f"{fast:.1f} to {slow:.1f}"
    pointed_out = {table.rows[row][7].split(":")[0] for row, _ in table.bad}
    assert OOM in pointed_out
    assert "ceilings in the same run: 700.00 TFLOP/s in bf16, 1400.0 in int8" in page.text
    assert "16-bit products reach 88%" in page.text
    pictures = [part for part in found[0].parts if isinstance(part, Figure)]
    assert len(pictures) == 2 and "one step of" in pictures[1].svg


@pytest.mark.slow
def test_all_tiers_in_one_table(tier: dict[str, Any]) -> None:
    """Predictions alone, the smallest tier first, for the cards that stand for them; one tier has no such table."""
    other = json.loads(json.dumps(tier))
    other["tier"] |= {"name": "6gb", "gpu_name": "RTX 3060 Laptop 6GB", "vram_bytes": 6 * 10**9}
    other["cells"] = [{**cell, "gpu": "RTX 3060 Laptop 6GB"} for cell in other["cells"] if cell["format"] == "int8"]
    found = sections({"b.json": other, "a.json": tier})
    assert found[0].title == "All tiers" and found[1].title == "Tier 6gb (b.json)"
    text, table = found[0].parts
    assert "predicted, not measured" in text and table.header == ("tier and card", "int8", "bf16")
    assert [row[0] for row in table.rows] == ["4gb: RTX 3050 Laptop 4GB", "6gb: RTX 3060 Laptop 6GB"]
    (fast, slow), peak = tier["cells"][0]["seconds"]["range"], tier["cells"][0]["peak_vram_bytes"]
    assert [row[1] for row in table.rows] == [f"{fast:.1f} to {slow:.1f} s, {peak / 2**30:.2f} GiB"] * 2
    assert table.rows[1][2] == "-"
    tier["cells"][0]["outcome"] = "does not fit"
    tier["cells"][0]["reason"] = "8 GB more than there is"
    assert sections({"b.json": other, "a.json": tier})[0].parts[1].rows[0][1] == "does not fit"
    assert sections({"a.json": tier})[0].title == "Tier 4gb (a.json)"
