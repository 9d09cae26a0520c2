"""What people type after --workers."""

from __future__ import annotations

import pytest

from zimage_lite.errors import UserError
from zimage_lite.workers.places import Workers


@pytest.mark.parametrize(
    ("text", "address", "count"),
    [
        ("2", None, 2),
        ("gpus", None, None),
        ("ray://lab", "ray://lab:10001", None),
        ("ray://lab/8", "ray://lab:10001/", 8),
        ("ray://10.0.0.5:20001/8", "ray://10.0.0.5:20001", 8),
        ("ray://[fe80::1]:5", "ray://[fe80::1]:5", None),
        ("ray://auto", "auto", None),
    ],
)
def test_where_and_how_many(text: str, address: str | None, count: int | None) -> None:
    assert Workers.of(text) == Workers(address and address.rstrip("/"), count)


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "two", "2.5", "ray://", "ray://lab/0", "ray://lab/x", "http://lab", "lab:1"]
)
def test_anything_else_is_told_in_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"--workers: got .*, expected a number, gpus"):
        Workers.of(text)
