"""What a picture says of itself, for tests."""

from __future__ import annotations

from typing import Any

PROMPT = 'a red fox, 你好 "quoted"\nand a line'


def a_recipe(**changes: Any) -> dict[str, Any]:
    """As of a picture that was drawn."""
    found = {
        "version": "zimage-lite 0.1.0", "size": [1024, 768], "prompt": PROMPT, "negative": "", "seed": 7,
        "width": 1024, "height": 768, "steps": 8, "guidance": 0.0, "shift": 3.0, "sampler": "euler",
        "schedule": "simple", "loras": [], "model": {"name": "Z-Image-Turbo-q4_k_m", "format": "q4_k_m"},
    }  # fmt: skip
    return {**found, **changes}
