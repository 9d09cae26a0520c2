"""Results of `zimage-lite bench`, of `compare` and of benchmarks/ -> sections for one page: what was measured, what was
predicted for cards that were not there, and how far predictions were off where both are known.

Files may come from anywhere: what they hold is text and numbers to show, never markup, and a file of another shape is
refused by its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bench.harness import KIND
from ..compare.section import COMPARE, compare_section
from ..errors import UserError
from ..page.html import NOTHING, Section, Table, gb
from .others import sections_of
from .ratios import MOST_OFF, compared
from .tiers import overview, tier_section

TITLE = "zimage-lite: time and memory"
Results = Mapping[str, Mapping[str, Any]]

_MOST_BYTES = 100_000_000
_WRONG_SHAPE = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError)


def load(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """-> by file name. Raises UserError for what is no result."""
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise UserError(f"{path}: too large for a result", expected=f"at most {_MOST_BYTES // 10**6} MB")
            result = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON") from error
        if not isinstance(result, dict):
            raise _not_ours(path.name)
        name = path.name if path.name not in found else str(path)
        found[name] = result
    return found


def sections(results: Results) -> list[Section]:
    """Raises UserError for a file that has another shape than what our benchmarks write."""
    found: list[Section] = []
    for name, result in results.items():
        try:
            made = _made(name, result)
            compared({name: result})
        except _WRONG_SHAPE as error:
            raise _not_ours(name) from error
        if not made:
            raise _not_ours(name)
        if "note" in result:  # by whoever ran it: what else to know
            made[0].parts.insert(0, str(result["note"]))
        found += made
    tiers = [result for result in results.values() if result.get("kind") == KIND and result["tier"]]
    return [*overview(tiers), *found, _predictions(results), _machines(results)]


def _made(name: str, result: Mapping[str, Any]) -> list[Section]:
    kind = result.get("kind")
    if kind == KIND:
        return [tier_section(name, result)]
    return [compare_section(name, result)] if kind == COMPARE else list(sections_of(name, result))


def _not_ours(name: str) -> UserError:
    return UserError(
        f"{name}: not a result that this version can show", expected="the JSON of bench, compare or benchmarks/"
    )


def _predictions(results: Results) -> Section:
    found = compared(results)
    section = Section("Predicted against measured")
    if not found:
        section.parts.append("No result here holds both.")
        return section
    section.parts.append(
        f"Predicted / measured: below 1 the prediction was too good. What is off by more than {MOST_OFF:.0%} anywhere "
        "shows its error. Times on a CPU rest on the rate of one short product, or in older results on that of an "
        "assumed laptop, and leave out what small models mostly wait for; peaks are promises that hold on any machine."
    )
    rows, bad = [], set()
    for row, one in enumerate(found):
        if one.off:
            bad.add((row, 6))
        error = f"off by {one.worst:+.0%}" if one.off else "within"
        some = f"{min(one.values):.2f} to {max(one.values):.2f}" if len(one.values) > 1 else NOTHING
        rows.append([one.source, one.what, one.quantity, str(len(one.values)), f"{one.middle:.2f}", some, error])
    header = ("file", "what", "quantity", "runs", "ratio", "from, to", "error")
    section.parts.append(Table(header, rows, texts=3, bad=frozenset(bad)))
    return section


def _fact(key: str, value: Any) -> str:
    if key.endswith("_bytes") and isinstance(value, int):
        return f"{key.removesuffix('_bytes')} {gb(value)}"
    return f"{key} {value}"


def _machines(results: Results) -> Section:
    rows = []
    for name, result in results.items():
        own = {key: result[key] for key in ("commit", "version") if key in result}
        facts = {**dict(result.get("machine") or {}), **dict(result.get("card") or {}), **own}
        told = ", ".join(_fact(key, value) for key, value in facts.items() if value is not None)
        rows.append([name, told])
    return Section("Machines and versions", [Table(("file", "machine"), rows, texts=2)])
