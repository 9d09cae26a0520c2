"""Tables of other results: budgets of RAM."""

from __future__ import annotations

from result_pages import budgets, require_self_contained

from zimage_lite.page.html import Table, as_html
from zimage_lite.report.sections import sections


def test_budgets_of_ram() -> None:
    found = sections({"budgets_cpu.json": budgets()})
    table = next(part for part in found[0].parts if isinstance(part, Table))
    assert [row[7] for row in table.rows] == ["kept", "not kept", "error: too small"]
    assert table.bad == {(1, 7), (2, 7)}
    require_self_contained(as_html("t", found))
