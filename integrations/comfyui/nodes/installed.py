"""What has to be there beside ComfyUI. Nothing is installed from here: the line that installs it is told, and keeps
ComfyUI's own torch."""

from __future__ import annotations

import sys
from importlib import metadata
from importlib.util import find_spec

OLDEST_TORCH = (2, 11)


def require_zimage_lite() -> None:
    """Raise ImportError, which ComfyUI shows beside the name of this folder, with what to do."""
    torch = metadata.version("torch")
    if tuple(map(int, torch.split(".")[:2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(f"zimage-lite needs torch {oldest} or newer, and ComfyUI's is {torch}; update ComfyUI first")
    if find_spec("zimage_lite") is None:
        python = f'"{sys.executable}"' if " " in sys.executable else sys.executable  # PowerShell runs no quoted text
        line = f'{python} -m pip install zimage-lite "torch=={torch}"'
        raise ImportError(f"zimage-lite is not installed here; run: {line}")
