"""Sizes as people write them, GB being 10^9 bytes and GiB 2^30, and rounded to whole pieces."""

from __future__ import annotations

import re

from .errors import UserError

_UNITS = {"b": 1}
_UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)}
_UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)}
_UNITS |= {prefix: 1000**power for power, prefix in enumerate("kmgt", start=1)}


def parse_bytes(text: str) -> int:
    """'6GB', '5.5 GiB', '800M' -> bytes. Raises UserError for anything that is not a positive size."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    size = float(match[1]) * _UNITS.get(match[2], 0) if match else 0
    if not 1 <= size < 2**63:
        raise UserError("not a size", got=repr(text), expected="a number with a unit, such as 6GB, 5.5GiB or 800MB")
    return round(size)


def ceiling(text: str | None) -> int | None:
    """What --ram or --vram says, in bytes; None if it was not given. Raises UserError, also for an empty text, which is
    a variable that was never set, and no wish for all memory."""
    return None if text is None else parse_bytes(text)


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def format_gb(n_bytes: float) -> str:
    """Bytes -> '12.31 GB' (10^9) or '3.4 MB' (10^6), for files and RAM."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def counted(count: int, what: str) -> str:
    """'1 module', '240 modules'."""
    return f"{count} {what}{'' if count == 1 else 's'}"
