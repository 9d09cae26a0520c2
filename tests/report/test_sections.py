"""Reports: that pages need no network, that nothing in a result becomes markup, that ratios are right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from zimage_lite.bench.harness import Request, bench, summary
from zimage_lite.bench.tiers import OOM, TIERS
from zimage_lite.cli import run
from zimage_lite.errors import UserError
from zimage_lite.page import plots as report_plots
from zimage_lite.page.html import Figure, Section, Table, as_html, as_markdown
from zimage_lite.page.plots import Plot, Point
from zimage_lite.report.ratios import compared
from zimage_lite.report.sections import load, sections

COMMITTED = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.json"))
HOSTILE = "</td><script>alert(1)</script><img src=http://x.example/a onerror='b'>\"|`[x](http://x.example)\n# y"
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails if they do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def require_self_contained(html: str) -> Page:
    """Nothing that a browser would fetch or run; every picture well-formed."""
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form", "image", "use"} & set(page.tags)
    for name, value in page.attributes:
        assert name not in ("src", "href", "xlink:href", "srcset", "data", "action", "style", "background")
        assert not name.startswith("on")
        assert "http" not in (value or "") or name == "xmlns"
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style and "url(" not in style[1] and "@import" not in style[1] and "prefers-color-scheme:dark" in style[1]
    assert "default-src &#x27;none&#x27;" in html  # the browser refuses what would be loaded
    pictures = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(pictures) == html.count("<svg")
    for picture in pictures:
        ElementTree.fromstring(picture)
    return page


def tables_of(markdown: str) -> list[list[list[str]]]:
    """Cells by an independent reading: a pipe that no backslash precedes ends one."""
    found: list[list[list[str]]] = [[]]
    for line in markdown.splitlines():
        if line.startswith("|"):
            found[-1].append(re.split(r"(?<!\\)\|", line)[1:-1])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


@pytest.fixture
def tier(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A prediction, and beside it measurements as bench writes them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    request = Request.of(TIERS["4gb"], None, ["int8", "bf16"], [1024], 5)
    result = bench(request, lambda line: None, lambda one: None)
    result["prediction"] = False
    result["machine"]["gpu"] = "H200"
    facts = {"prediction": False, "model": "synthetic:int8", "format": "int8", "size": [1024, 1024]}
    planned = result["cells"][0]["phases"]["denoise"]["planned"]
    plans = {"denoise": {**planned, "total_ms": 5000.0, "pass_ms": 500.0, "peak_ram_bytes": 10**9}}
    phase = {"seconds": 4.0, "peak_rss_bytes": 10**9, "copied_bytes": 10**9, "read_bytes": 0, "wait_seconds": 0.1}
    phase |= {"peak_vram_bytes": 2**31, "peak_reserved_bytes": 2**31}
    runs = [{"seconds": s, "step_seconds": [1.0, 0.5], "phases": {"denoise": phase}} for s in (9.0, 5.0, 6.0)]
    work = {"denoise": {"flops": 4e12, "limit_seconds": 2.0, "pass_flops": 1e12, "pass_limit_seconds": 0.3}}
    peaks = {"process_peak_bytes": 3 * 10**9, "peak_rss_bytes": 10**9}
    ceilings = {"dtype": "bf16", "tflops": 700.0, "int8_tops": 1400.0, "attention8": True}
    raw = {"outcome": "done", "runs": runs, "plans": plans, "work": work, "told": [], "ceilings": ceilings, **peaks}
    gone = {**facts, "format": "bf16", "outcome": OOM, "reason": "2 GB more than there is"}
    result["cells"] += [{**facts, **summary(raw)}, gone]
    return dict(json.loads(json.dumps(result)))


def budgets() -> dict[str, Any]:
    """In the shape of benchmarks/budgets.py: predictions of 2 s that took 1 s and 4 s, and a refusal."""
    planned = {"total_ms": 2000.0, "pass_ms": 1000.0, "blocks": {"device": 3}}
    runs: list[dict[str, Any]] = [
        {
            "format": "int8", "size": 256, "ram_bytes": ram * 10**9, "wall_seconds": 3.0, "kept": kept,
            "peak_rss_bytes": 100, "planned_rss_bytes": 104, "step_seconds": [2.0, 1.0],
            "phases": {"denoise": {"planned": planned, "measured": {"seconds": seconds}}},
        }
        for ram, seconds, kept in ((6, 1.0, True), (8, 4.0, False))
    ]  # fmt: skip
    runs.append({"format": "int8", "size": 256, "ram_bytes": 10**9, "refused": "error: too small", "kept": True})
    return {"machine": {"cpu": "of a test"}, "commit": "abc", "steps": 2, "runs": runs}


# --- Pages


def test_committed_results_make_a_page(tmp_path: Path) -> None:
    """All that the repository holds, through the command line."""
    html, markdown = tmp_path / "r.html", tmp_path / "r.md"
    assert COMMITTED
    assert run(["report", *map(str, COMMITTED), "-o", str(html), "--markdown", str(markdown)]) == 0
    page = require_self_contained(html.read_text(encoding="utf-8"))
    assert "q4_k_m" in page.text and "streaming_threads.json" in page.text and "svg" in page.tags
    for table in tables_of(markdown.read_text(encoding="utf-8")):
        assert len({len(row) for row in table}) == 1 and len(table) > 2


def test_tier_beside_its_predictions(tier: dict[str, Any]) -> None:
    found = sections({"tier.json": tier})
    page = require_self_contained(as_html("t", found))
    table = next(part for part in found[0].parts if isinstance(part, Table))
    rows = {(row[0], row[1]): row for row in table.rows}
    measured = rows["H200, measured", "int8"]
    assert measured[3:7] == ["5.50 (5.00 to 6.00), cold 9.00", "2.79 GiB", "1.00 GB", "60% of a step"]
    assert rows["H200, measured", "bf16"][7] == "out of memory: 2 GB more than there is"
    fast, slow = tier["cells"][0]["seconds"]["range"]
    assert rows["RTX 3050 Laptop 4GB, predicted", "int8"][3] == f"{fast:.1f} to {slow:.1f}"
    pointed_out = {table.rows[row][7].split(":")[0] for row, _ in table.bad}
    assert OOM in pointed_out
    assert "ceilings in the same run: 700.00 TFLOP/s in bf16, 1400.0 in int8" in page.text
    assert "16-bit products reach 88%" in page.text
    pictures = [part for part in found[0].parts if isinstance(part, Figure)]
    assert len(pictures) == 2 and "one step of" in pictures[1].svg


def test_all_tiers_in_one_table(tier: dict[str, Any]) -> None:
    """Predictions alone, the smallest tier first, for the cards that stand for them; one tier has no such table."""
    other = json.loads(json.dumps(tier))
    other["tier"] |= {"name": "6gb", "gpu_name": "RTX 3060 Laptop 6GB", "vram_bytes": 6 * 10**9}
    other["cells"] = [{**cell, "gpu": "RTX 3060 Laptop 6GB"} for cell in other["cells"] if cell["format"] == "int8"]
    found = sections({"b.json": other, "a.json": tier})
    assert found[0].title == "All tiers" and found[1].title == "Tier 6gb (b.json)"
    text, table = found[0].parts
    assert "predicted, not measured" in text and table.header == ("tier and card", "int8", "bf16")
    assert [row[0] for row in table.rows] == ["4gb: RTX 3050 Laptop 4GB", "6gb: RTX 3060 Laptop 6GB"]
    (fast, slow), peak = tier["cells"][0]["seconds"]["range"], tier["cells"][0]["peak_vram_bytes"]
    assert [row[1] for row in table.rows] == [f"{fast:.1f} to {slow:.1f} s, {peak / 2**30:.2f} GiB"] * 2
    assert table.rows[1][2] == "-"
    tier["cells"][0]["outcome"] = "does not fit"
    tier["cells"][0]["reason"] = "8 GB more than there is"
    assert sections({"b.json": other, "a.json": tier})[0].parts[1].rows[0][1] == "does not fit"
    assert sections({"a.json": tier})[0].title == "Tier 4gb (a.json)"


def test_budgets_of_ram() -> None:
    found = sections({"budgets_cpu.json": budgets()})
    table = next(part for part in found[0].parts if isinstance(part, Table))
    assert [row[7] for row in table.rows] == ["kept", "not kept", "error: too small"]
    assert table.bad == {(1, 7), (2, 7)}
    require_self_contained(as_html("t", found))


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


# --- Predicted against measured


def ratio(found: list[Any], what: str, quantity: str) -> Any:
    (one,) = (one for one in found if (one.what, one.quantity) == (what, quantity))
    return one


def test_ratios_of_generated_images() -> None:
    found = compared({"b": budgets()})
    quick, slow = (ratio(found, f"int8 256 px in {ram} GB, denoise", "time") for ram in (6, 8))
    assert quick.values == (2.0,) and quick.worst == 1.0 and quick.off  # 2 s were predicted, 1 s was taken
    assert slow.values == (0.5,) and slow.worst == -0.5 and slow.off
    step = ratio(found, "int8 256 px in 6 GB", "time of a step")
    assert step.values == (1.0,) and not step.off  # the second step, since the first one loads
    memory = ratio(found, "int8 256 px in 6 GB", "peak memory")
    assert memory.values == (1.04,) and not memory.off
    assert len(found) == 6  # a refusal has nothing to compare


def test_ratios_of_a_tier(tier: dict[str, Any]) -> None:
    """Only of what was measured: 5 s and 0.5 s a step were predicted, 4 s and 0.5 s taken."""
    found = compared({"t": tier})
    assert ratio(found, "int8 1024 px, denoise", "time").values == (1.25,)
    assert ratio(found, "int8 1024 px", "time of a step").values == (1.0,)
    planned = tier["cells"][-2]["plans"]["denoise"]["peak_vram_bytes"]
    assert ratio(found, "int8 1024 px", "peak memory of the GPU").middle == pytest.approx(planned / 3e9)
    assert ratio(found, "int8 1024 px", "peak memory").values == (1.0,)
    assert len(found) == 4


def test_ratios_of_other_benchmarks() -> None:
    rows = [{"device": "gpu", "home": "file", "simulated_ms": 100.0, "step_ms": ms} for ms in (100.0, 80.0, 125.0)]
    counted = [{"way": "whole", "size": "1x1", "predicted_bytes": 3, "peak_bytes": 2}]
    case = {
        "name": "int8", "size": 512, "cap_bytes": 2**32, "steady_ms": 10.0, "process_peak_bytes": 100,
        "planned_peak_bytes": 110, "plans": {"denoise": {"total_ms": 3000.0, "pass_ms": 9.0}},
        "phases": {"denoise": {"seconds": 2.0}},
    }  # fmt: skip
    found = compared({"a": {"rows": rows}, "b": {"counted": counted}, "c": {"cases": [case, {"failed": "no"}]}})
    workers = ratio(found, "workers, gpu file", "time of a step")
    assert workers.values == (1.0, 1.25, 0.8) and workers.middle == 1.0 and workers.worst == 0.25
    assert ratio(found, "VAE 1x1, whole", "peak memory").values == (1.5,)
    assert ratio(found, "int8 512 px in 4 GiB, denoise", "time").values == (1.5,)
    assert ratio(found, "int8 512 px in 4 GiB", "time of a step").values == (0.9,)
    assert ratio(found, "int8 512 px in 4 GiB", "peak memory of the GPU").values == (1.1,)


def test_errors_are_printed_with_the_prediction() -> None:
    """Of every comparison in the committed results that is off by more than 15 %, and of no other."""
    results = load(COMMITTED)
    found, page = compared(results), sections(results)
    (table,) = (
        part for part in next(s for s in page if s.title.startswith("Predicted")).parts if isinstance(part, Table)
    )
    assert len(table.rows) == len(found) > 10
    for row, one in zip(table.rows, found, strict=True):
        off = any(abs(value - 1) > 0.15 for value in one.values)
        assert row[6].startswith("off by") if off else row[6] == "within"


# --- Plots


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
