"""Plots: ticks, and that points and labels lie where they should."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from zimage_lite.page import plots as report_plots
from zimage_lite.page.plots import Plot, Point


def test_ticks() -> None:
    assert report_plots._ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert report_plots._ticks(2.1, 3.9) == [2.0, 2.5, 3.0, 3.5, 4.0]
    assert report_plots._ticks(5, 5)[0] <= 5 <= report_plots._ticks(5, 5)[-1]
    assert report_plots._log_ticks(0.03, 0.3) == [0.02, 0.05, 0.1, 0.2, 0.5]
    assert report_plots._log_ticks(1, 1) == [1, 2]


def test_points_lie_where_their_values_say() -> None:
    """The outermost ticks are at the edges of the plot, and the middle of the axis in the middle; of a logarithmic axis
    that is the geometric mean."""
    points = {"a": [Point(0, 0), Point(10, 10), Point(5, 5, high=10)]}
    found = dots(Plot("t", "x", "y", points).svg())
    assert found == [(56.0, 274.0), (424.0, 14.0), (240.0, 144.0)]
    found = dots(Plot("t", "x", "y", {"a": [Point(0, 1), Point(10, 100), Point(5, 10)]}, logarithmic=True).svg())
    assert [y for _, y in found] == [274.0, 14.0, 144.0]


def dots(svg: str) -> list[tuple[float, float]]:
    root = ElementTree.fromstring(svg)
    return [(float(one.attrib["cx"]), float(one.attrib["cy"])) for one in root.iter("circle")]


def test_labels_do_not_lie_on_each_other() -> None:
    near = {"a": [Point(1 + i / 1000, 1.0, label=f"name{i}") for i in range(12)]}
    near["a"] += [Point(0, 0), Point(2, 2)]
    svg = ElementTree.fromstring(Plot("t", "x", "y", near).svg())
    placed = [one for one in svg.iter("text") if (one.text or "").startswith("name")]
    assert 2 <= len(placed) <= 4  # of twelve at one place, those that there is room for around it
    assert len({(one.attrib["x"], one.attrib["y"], one.attrib["text-anchor"]) for one in placed}) == len(placed)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_points_that_are_nowhere(bad: float) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        Plot("t", "x", "y", {"a": [Point(1, bad)]}).svg()
