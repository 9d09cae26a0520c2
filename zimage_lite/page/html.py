"""A report as sections of text, tables and pictures, and how they become HTML or Markdown.

Whatever text comes in is escaped here, once for each of the two: builders never write markup. The page loads nothing,
and tells the browser to refuse whatever would.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

_STYLE = """
:root{color-scheme:light dark;--ink:#1c1e21;--soft:#5f6670;--paper:#fff;--line:#d9dde3;--track:#f1f3f5;--bad:#b3261e;
--c0:#2f6db0;--c1:#c7621a;--c2:#3c8c3a;--c3:#8a4fb5;--c4:#a8384f;--c5:#5b6b73}
@media (prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#a0a8b2;--paper:#15181c;--line:#343a42;--track:#22272d;
--bad:#ff8a80;--c0:#6fb1f5;--c1:#f5a15f;--c2:#7fce7c;--c3:#c79bea;--c4:#ef8095;--c5:#a9b8c0}}
body{margin:0 auto;padding:1rem;max-width:72rem;font:16px/1.5 system-ui,sans-serif;color:var(--ink);
background:var(--paper);overflow-wrap:break-word}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2.5rem;border-bottom:1px solid var(--line)}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--soft);font-weight:600}td.text,th.text{text-align:left}td.bad{color:var(--bad)}
td.long{white-space:normal;min-width:10rem;text-align:left}figure{margin:1.5rem 0}
figcaption{color:var(--soft);font-size:.875rem}svg{display:block;width:100%}svg text{fill:var(--ink)}
svg.plot{max-width:34rem}.timeline svg{min-width:44rem}.timeline rect[fill="#f4f4f4"]{fill:var(--track)}
.pictures{display:flex;flex-wrap:wrap;gap:.75rem}.pictures figure{margin:0}.pictures img{max-width:16rem}
.grid{stroke:var(--line);stroke-width:1}.line{fill:none;stroke-width:1.5;opacity:.6}.bar{stroke-width:5;opacity:.45}
"""
_COLOURS = "".join(
    f".c{i}{{stroke:var(--c{i})}}.dot.c{i}{{fill:var(--c{i});stroke:var(--paper)}}" for i in range(6)
)  # fmt: skip
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_MARKDOWN = re.compile(r"([\\`*_\[\]#|~!])")
_LONG = 40  # characters

NOTHING = "-"  # in a cell
GIB = 2**30


@dataclass(frozen=True)
class Table:
    """header: column names; those of text stand left, numbers right. bad: (row, column) of cells to point out."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1  # so many columns from the left are text
    bad: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True)
class Figure:
    """svg: markup made by this package. Markdown shows the caption alone."""

    svg: str
    caption: str
    wide: bool = False  # may be scrolled on a phone


@dataclass(frozen=True)
class Pictures:
    """shown: JPEG, and what stands below it. They become part of the page; Markdown shows what stands below."""

    shown: Sequence[tuple[bytes, str]]


Part = str | Table | Figure | Pictures


@dataclass
class Section:
    """parts: paragraphs as text, tables, figures and pictures, in order."""

    title: str
    parts: list[Part] = field(default_factory=list)


def as_html(title: str, sections: Sequence[Section], refresh_s: int | None = None) -> str:
    """A page that needs nothing else. refresh_s: is read again so often, as long as it is open."""
    again = f'<meta http-equiv="refresh" content="{refresh_s}">\n' if refresh_s else ""
    body = "\n".join(f"<h2>{escape(one.title)}</h2>\n" + "\n".join(map(_html, one.parts)) for one in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{again}<title>{escape(title)}</title>\n<style>{_STYLE}{_COLOURS}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def as_markdown(title: str, sections: Sequence[Section]) -> str:
    found = [f"# {_plain(title)}"]
    for section in sections:
        found += [f"## {_plain(section.title)}", *map(_markdown, section.parts)]
    return "\n\n".join(found) + "\n"


def _html(part: Part) -> str:
    if isinstance(part, str):
        return f"<p>{escape(part)}</p>"
    if isinstance(part, Pictures):
        return f'<div class="pictures">{"".join(_picture(*one) for one in part.shown)}</div>'
    if isinstance(part, Figure):
        kind = ' class="timeline"' if part.wide else ""
        caption = f"<figcaption>{escape(part.caption)}</figcaption>"
        return f'<figure><div class="wide"><div{kind}>{part.svg}</div></div>{caption}</figure>'
    head = "".join(f"<th{_kind(part, column)}>{escape(name)}</th>" for column, name in enumerate(part.header))
    rows = []
    for number, row in enumerate(part.rows):
        cells = (
            f"<td{_kind(part, column, text, (number, column) in part.bad)}>{escape(text)}</td>"
            for column, text in enumerate(row)
        )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    lines = "\n".join(rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{lines}\n</tbody></table></div>'


def _picture(jpeg: bytes, text: str) -> str:
    data = f"data:image/jpeg;base64,{b64encode(jpeg).decode()}"
    return f'<figure><img src="{data}" alt="{escape(text)}"><figcaption>{escape(text)}</figcaption></figure>'


def _kind(table: Table, column: int, text: str = "", bad: bool = False) -> str:
    names = ["text"] * (column < table.texts) + ["long"] * (len(text) > _LONG) + ["bad"] * bad
    return f' class="{" ".join(names)}"' if names else ""


def _markdown(part: Part) -> str:
    if isinstance(part, str):
        return _plain(part)
    if isinstance(part, Pictures):
        return f"*{_plain(', '.join(text for _, text in part.shown))} (pictures in the HTML page)*"
    if isinstance(part, Figure):
        return f"*{_plain(part.caption)} (the picture is in the HTML page)*"
    lines = [part.header, ["---" if i < part.texts else "---:" for i in range(len(part.header))], *part.rows]
    return "\n".join(
        "| " + " | ".join(line if number == 1 else map(_plain, line)) + " |" for number, line in enumerate(lines)
    )


def _plain(text: str) -> str:
    """One line that Markdown takes as it is."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return _MARKDOWN.sub(r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB"
