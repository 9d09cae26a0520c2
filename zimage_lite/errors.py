"""What can go wrong because of the user's input, each told in one line: what, got, expected, what to do.

Everything else that is raised is our own fault and keeps its traceback.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_USER = 2
EXIT_BUDGET = 3
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count


class UserError(Exception):
    """The input is at fault. `str()` is the single line that the user reads."""

    exit_code = EXIT_USER

    def __init__(self, what: str, *, got: object = None, expected: object = None, fix: str | None = None) -> None:
        text = what
        if got is not None:
            text += f": got {got}"
        if expected is not None:
            text += f", expected {expected}" if got is not None else f": expected {expected}"
        if fix is not None:
            text += f"; {fix}"
        # File names and headers come from outside: no line break and no terminal escape may slip into the one line.
        printable = "".join(char if char.isprintable() else " " for char in text)
        super().__init__(" ".join(printable.split()))


class FileFormatError(UserError):
    """A file is broken, truncated, or not of a kind that can be read."""


class WrongModelError(UserError):
    """The file is sound, but it holds another model, or lacks a part of this one."""


class BudgetError(UserError):
    """The work does not fit the budget. The line names the smallest budget that would do."""

    exit_code = EXIT_BUDGET
