"""Models compared in few steps, and the report's table."""

from __future__ import annotations

from typing import Any

from zimage_lite.cli import run
from zimage_lite.page.html import Table
from zimage_lite.report.sections import sections

RED, BLUE = "a red circle on a blue background", "蓝色背景上的黄色星形"
SHORT = ("--steps", 2, "--device", "cpu")


def compare(*args: object) -> int:
    return run([str(arg) for arg in ("compare", *args, *SHORT)])


def table(result: dict[str, Any]) -> Table:
    (found,) = (part for part in sections({"c.json": result})[0].parts if isinstance(part, Table))
    return found
