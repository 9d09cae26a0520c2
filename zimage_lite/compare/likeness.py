"""Figures of how alike two pictures are: their names and how they are written. Computed in similarity.py. Pure."""

from __future__ import annotations

IDENTICAL_DB = 100.0  # what PSNR is capped at: beyond what 8 bits can show
NAMES = {"psnr_db": "PSNR", "ssim": "SSIM", "lpips": "LPIPS"}


def said(figure: str, value: float) -> str:
    """With its unit."""
    if figure == "psnr_db":
        return f"{value:.1f} dB" if value < IDENTICAL_DB else "identical"
    return f"{value:.4f}"
