"""Quantizers that need numba say so where it compiles nothing."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("obstacle", "fix"),
    [("numba cannot be imported (no)", "install numba again"), ("NUMBA_DISABLE_JIT is set", "unset it")],
)
@pytest.mark.parametrize("to", ["q4_k_m", "q8_0", "int8"])
def test_one_line(
    tiny: Path, tmp_path: Path, refused, monkeypatch: pytest.MonkeyPatch, obstacle: str, fix: str, to: str
) -> None:
    monkeypatch.setattr("zimage_lite.quant.loops.loops_obstacle", lambda: obstacle)
    line = refused("quantize", tiny / "transformer", "--to", to, "-o", tmp_path / "out")
    assert line == f"error: quantizing takes loops that numba compiles: got {obstacle}; {fix}"
    assert list(tmp_path.iterdir()) == []
