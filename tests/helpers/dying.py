"""A `zimage-lite` that is killed, as by `kill -9`, at a moment that one can name.

python dying.py MODULE:FUNCTION NUMBER ARGUMENTS... ends at that call of it.
"""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import subprocess
import sys
from functools import reduce
from typing import Any


def killed_at(where: str, number: int, *args: object) -> bool:
    """Run a command line in a process of its own. Returns whether it came to that moment."""
    command = [sys.executable, __file__, where, str(number), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


def main(where: str, number: str, *args: str) -> int:
    from zimage_lite.cli import run

    module, _, path = where.partition(":")
    *outer, name = path.split(".")
    holder: Any = reduce(getattr, outer, importlib.import_module(module))
    plain, calls = getattr(holder, name), itertools.count(1)

    def deadly(*given: Any, **named: Any) -> Any:
        if next(calls) == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*given, **named)

    setattr(holder, name, deadly)
    return run(list(args))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
