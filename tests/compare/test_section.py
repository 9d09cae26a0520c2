"""A comparison in the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from comparing import RED, compare, table

from zimage_lite.checkpoint.model_card import DEMO
from zimage_lite.cli import run
from zimage_lite.page.html import as_markdown
from zimage_lite.report.ratios import compared
from zimage_lite.report.sections import sections


@pytest.mark.slow
def test_report(models: Path, tmp_path: Path) -> None:
    assert compare(DEMO, models / "q8_0", "--prompt", RED, "-o", tmp_path / "s.png") == 0
    assert run(["report", str(tmp_path / "s.json"), "-o", str(tmp_path / "r.html")]) == 0
    result = json.loads((tmp_path / "s.json").read_text())
    found, alike = table(result), result["models"][1]["alike"]
    assert found.header[-2:] == ["PSNR", "SSIM"]
    reference, q8_0 = found.rows
    assert reference[:2] == ["demo", "bf16"] and reference[-2:] == ["reference"] * 2
    assert q8_0[-2] == f"{alike['psnr_db']['mean']:.1f} dB ({alike['psnr_db']['mean']:.1f} dB)"
    text = as_markdown("t", sections({"c.json": result}))
    assert "LPIPS is left out: its package is not installed" in text
    assert "noise" not in text
    assert [(one.what, one.middle >= 1) for one in compared({"c.json": result})] == [("demo", True), ("q8_0", True)]
    result["models"][1]["synthetic"] = True
    assert "noise" in as_markdown("t", sections({"c.json": result}))
