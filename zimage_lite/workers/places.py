"""What --workers says: where they are and how many. Loads no Ray."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import UserError

GPUS, SCHEME, CLIENT_PORT = "gpus", "ray://", 10001
_HOST = r"(?P<host>[\w.-]+|\[[0-9a-fA-F:]+\])(?P<port>:\d{1,5})?"
_PATTERN = re.compile(rf"(ray://{_HOST}(/|$))?(?P<count>\d{{1,3}})?")
EXPECTED = "a number, gpus (one on each of this machine), or ray://HOST[:PORT][/NUMBER]"


@dataclass(frozen=True)
class Workers:
    """address: of a Ray cluster, "auto" for the one that this machine is part of, None for processes of this machine;
    count: None for one on each GPU that is there."""

    address: str | None = None
    count: int | None = None

    @classmethod
    def of(cls, text: str) -> Workers:
        """Raises UserError."""
        if text == GPUS:
            return cls()
        found = _PATTERN.fullmatch(text)
        if not found or not text or found["count"] in ("0", "00", "000"):
            raise UserError("--workers", got=repr(text)[:60], expected=EXPECTED)
        count = int(found["count"]) if found["count"] else None
        if found["host"] is None:
            return cls(None, count)
        if found["host"] == "auto":
            return cls("auto", count)
        return cls(f"{SCHEME}{found['host']}{found['port'] or f':{CLIENT_PORT}'}", count)
