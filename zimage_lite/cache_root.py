"""Where this program keeps what it may lose. Loads no torch."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "ZIMAGE_LITE_CACHE"  # names another folder; "0" or "off": none


def cache_root() -> Path | None:
    """The user's cache folder for this program, which may not exist yet; None if nothing is to be kept."""
    named = os.environ.get(VARIABLE, "").strip()
    if named.lower() in ("0", "off"):
        return None
    if named:
        return Path(named).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("zimage-lite", appauthor=False))
