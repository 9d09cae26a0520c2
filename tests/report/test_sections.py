"""Reports: that pages need no network, that nothing in a result becomes markup, that ratios are right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from result_pages import COMMITTED, Page, budgets, require_self_contained, tables_of

from zimage_lite.cli import run
from zimage_lite.errors import UserError
from zimage_lite.page.html import Section, Table, as_html, as_markdown
from zimage_lite.report.sections import load, sections

HOSTILE = "</td><script>alert(1)</script><img src=http://x.example/a onerror='b'>\"|`[x](http://x.example)\n# y"


def test_committed_results_make_a_page(tmp_path: Path) -> None:
    """All that the repository holds, through the command line."""
    html, markdown = tmp_path / "r.html", tmp_path / "r.md"
    assert COMMITTED
    assert run(["report", *map(str, COMMITTED), "-o", str(html), "--markdown", str(markdown)]) == 0
    page = require_self_contained(html.read_text(encoding="utf-8"))
    assert "q4_k_m" in page.text and "streaming_threads.json" in page.text and "svg" in page.tags
    for table in tables_of(markdown.read_text(encoding="utf-8")):
        assert len({len(row) for row in table}) == 1 and len(table) > 2


def test_what_else_there_is_to_know() -> None:
    """The words of whoever ran it come first, and bytes are written as people read them."""
    result = {
        **budgets(),
        "note": "beside other programs",
        "machine": {"cpu": "of a test", "memory_bytes": 25276514304},
    }
    budget, _, machines = sections({"b.json": result})
    assert budget.parts[0] == "beside other programs"
    (table,) = machines.parts
    assert isinstance(table, Table) and table.rows == [["b.json", "cpu of a test, memory 25.28 GB, commit abc"]]


def test_nothing_in_a_result_becomes_markup(tier: dict[str, Any]) -> None:
    """Every text in every kind of result replaced, file names included; only what says how a case ended stays."""
    plain = {path.name: json.loads(path.read_text()) for path in COMMITTED} | {"t": tier, "b": budgets()}

    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {"kind", "outcome"}
            return {key: one if key in kept else poisoned(one) for key, one in value.items()}
        if isinstance(value, list):
            return [poisoned(one) for one in value]
        return HOSTILE if isinstance(value, str) else value

    hostile = {f"{i}{HOSTILE}": poisoned(one) for i, one in enumerate(plain.values())}
    for one in hostile.values():
        one["machine"][HOSTILE] = HOSTILE
    found = sections(hostile)
    html = as_html(HOSTILE, found)
    page = require_self_contained(html)
    assert "<script>alert(1)</script>" in page.text  # as text
    assert set(page.tags) <= set(Page(as_html("t", sections(plain))).tags)
    markdown = as_markdown(HOSTILE, found)
    assert "<" not in markdown and "\\[x\\]" in markdown and "[x]" not in markdown
    assert all(line == "" or line[0] in "#|" or "\n" not in line for line in markdown.split("\n"))
    assert not re.search(r"^# y", markdown, re.MULTILINE)
    for table in tables_of(markdown):
        assert len({len(row) for row in table}) == 1


@pytest.mark.parametrize(
    "text",
    [
        "[]", "{}", "not JSON", '{"kind": "zimage-lite bench"}', '{"rows": 5, "captions": 1}',
        '{"runs": [{"kept": 1}]}',
        '{"counted": [{"size": 1}], "runs": []}', '{"cases": [{"cap_bytes": "x"}]}', "[" * 100_000,
        '{"kind": "zimage-lite bench", "tier": null, "machine": {}, "steps": 8, "cells": [{"prediction": 1}]}',
    ],
)  # fmt: skip
def test_other_files_are_refused(text: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "x.json").write_text(text)
    line = refused("report", tmp_path / "x.json", "-o", tmp_path / "out.html")
    assert "x.json: not " in line and not (tmp_path / "out.html").exists()


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load([tmp_path / "none.json"])


def test_markdown_is_taken_as_it_is() -> None:
    """Against what Markdown would make of it: emphasis, code, links, table cells, entities and tags."""
    text = as_markdown("t", [Section("s", ["a_b_ *c* `d` [e](f) g|h &amp; <i>\n- j"])])
    assert text == "# t\n\n## s\n\na\\_b\\_ \\*c\\* \\`d\\` \\[e\\](f) g\\|h &amp;amp; &lt;i&gt; - j\n"
