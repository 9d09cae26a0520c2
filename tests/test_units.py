"""Sizes in words, read and written."""

from __future__ import annotations

import pytest

from zimage_lite.errors import UserError
from zimage_lite.units import format_gb, parse_bytes


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("6GB", 6 * 10**9), ("6gb", 6 * 10**9), ("6G", 6 * 10**9), ("6 GiB ", 6 * 2**30), ("5.5GiB", 5.5 * 2**30),
     ("800MB", 8 * 10**8), ("1.5k", 1500), ("7b", 7), ("0.5KiB", 512), ("2TB", 2 * 10**12),
     ("4.1GB", 4_100_000_000), ("0.1kb", 100)],
)  # fmt: skip
def test_sizes(text: str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GB",
        "0",
        "8",
        "8000000000",
        "0GB",
        "-1GB",
        "1e3",
        "6 XB",
        "6GBs",
        "1.2.3GB",
        "nan",
        "inf",
        "0.1b",
        "9" * 400,
        "6,5GB",
    ],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="not a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(12_310_000_000, "12.31 GB"), (10**9, "1.00 GB"), (3_400_000, "3.4 MB"), (0, "0.0 MB")]
)
def test_sizes_in_words(n_bytes: int, text: str) -> None:
    assert format_gb(n_bytes) == text
