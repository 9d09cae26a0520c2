"""Which cases of a test run always."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def always(*some: Any, of: Iterable[Any]) -> list[Any]:
    """All cases, those but `some` with --run-full-size alone. A tuple is the arguments of one case."""
    return [case if case in some else pytest.param(*_arguments(case), marks=pytest.mark.full_size) for case in of]


def _arguments(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
