"""Texts are UTF-8 wherever they are read and written: left open, the encoding is the system's, on Windows one of 256
characters, which has neither all prompts nor all people's names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [file for tree in ("zimage_lite", "kernels", "integrations") for file in sorted((ROOT / tree).rglob("*.py"))]
MODES = {"open": 1, "fdopen": 1, "TemporaryFile": 0, "NamedTemporaryFile": 0}  # where the mode stands
TEXTS = {"read_text", "write_text"}
NO_FILES = {"Image", "os", "webbrowser", "files", "work"}  # X.open


def left_open(source: str) -> Iterator[int]:
    """Lines that read or write a text in the system's encoding."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        named = {keyword.arg: keyword.value for keyword in node.keywords}
        if "encoding" in named:
            continue
        function, owner = node.func, ""
        if isinstance(function, ast.Attribute):
            name, owner = function.attr, ast.unparse(function.value).rpartition(".")[2]
        else:
            name = function.id if isinstance(function, ast.Name) else ""
        if name in TEXTS or {"text", "universal_newlines"} & named.keys():
            yield node.lineno
        elif name in MODES and owner not in NO_FILES:
            place = MODES[name] - (name == "open" and bool(owner))  # a path's own has the mode first
            mode = named.get("mode", node.args[place] if len(node.args) > place else ast.Constant("r"))
            binary = name.endswith("File") and len(node.args) <= place and "mode" not in named
            if not binary and "b" not in str(getattr(mode, "value", "")):
                yield node.lineno


def test_encodings_are_named() -> None:
    found = {str(file.relative_to(ROOT)): list(left_open(file.read_text(encoding="utf-8"))) for file in FILES}
    assert len(found) > 300 and not {file: lines for file, lines in found.items() if lines}


@pytest.mark.parametrize(
    "source",
    [
        "open(path)", "open(path, 'w')", "path.open()", "path.open('a')", "path.read_text()", "path.write_text(text)",
        "TemporaryFile('w+')", "tempfile.NamedTemporaryFile(mode='w')", "subprocess.run(command, text=True)",
    ],
)  # fmt: skip
def test_one_that_is_not_is_found(source: str) -> None:
    assert list(left_open(source)) == [1]


@pytest.mark.parametrize(
    "source",
    ["open(path, 'rb')", "path.open('ab')", "Image.open(path)", "TemporaryFile()", "path.read_text(encoding='utf-8')"],
)
def test_what_needs_none_is_not(source: str) -> None:
    assert not list(left_open(source))
