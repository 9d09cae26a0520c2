"""Which cases of a test run always."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def always(*some: Any, of: Iterable[Any]) -> list[Any]:
    """All cases, those but `some` with --run-full-size alone."""
    return [case if case in some else pytest.param(case, marks=pytest.mark.full_size) for case in of]
