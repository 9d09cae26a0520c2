"""The order in which blocks stay."""

from __future__ import annotations

from zimage_lite.memory.placement import nested_order


def test_nested_order() -> None:
    for total in range(40):
        order = nested_order(total)
        assert sorted(order) == list(range(total))
    assert nested_order(8) == (0, 4, 2, 6, 1, 5, 3, 7)
