"""Results as benchmarks leave them, and pages taken apart."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

COMMITTED = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.json"))
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
