"""The timeline of a step, drawn."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from plans import GB, LAPTOP, denoise

from zimage_lite.memory.machine import machine
from zimage_lite.memory.plan import Budgets
from zimage_lite.memory.planner import plan_phases
from zimage_lite.plan.timeline import as_svg, as_text


def test_timeline(tmp_path: Path) -> None:
    made = plan_phases([[denoise("int8")]], machine(LAPTOP, 16 * GB), Budgets(4 * GB, 16 * GB))[0]
    copy, compute = as_text(made)
    assert copy.startswith("copy") and compute.startswith("compute") and len(copy) == len(compute)
    assert set(compute.split()[1]) == {"#", "0", "1"}  # compute never waits
    svg = ElementTree.fromstring(as_svg(made, "a < b"))
    assert sum(element.tag.endswith("rect") for element in svg.iter()) > 40
